import sys, time, random
sys.path.insert(0,'scripts')
import torch
from llama import new_model
from train import weighted_loss
from training_data import training_batch
from entmaxkv_kernels.triton.training import entmax_attention
for T in (512,2048,8192):
    B=65536//T
    q=(torch.randn(B,8,T,64,device='cuda')*3).bfloat16().requires_grad_()
    k,v=(torch.randn(B,2,T,64,device='cuda').bfloat16().requires_grad_() for _ in 'kv')
    g=torch.randn(B,8,T,64,device='cuda').bfloat16()
    for i in range(4):
        torch.cuda.synchronize(); t=time.time(); o=entmax_attention(q,k,v); torch.cuda.synchronize(); t1=time.time(); o.backward(g); torch.cuda.synchronize(); t2=time.time()
    print(f'T {T} forward {1e3*(t1-t):.2f} ms backward {1e3*(t2-t1):.2f} ms',flush=True)
m=new_model(alpha=1.5,layers=4,hidden=256,intermediate=512,heads=8,key_heads=2,longest=8704).cuda()
opt=torch.optim.AdamW(m.parameters(),lr=1e-3,fused=True)
rng=random.Random(0)
from torch.profiler import profile,ProfilerActivity
for T in (512,4096):
    tok,w=(torch.from_numpy(x).cuda() for x in training_batch(rng,65536//T,T,.1))
    def step():
        l,_=weighted_loss(m,tok,w); opt.zero_grad(); l.backward(); opt.step()
    for i in range(3): step()
    torch.cuda.synchronize(); t=time.time()
    for i in range(5): step()
    torch.cuda.synchronize(); print(f'T {T} step {(time.time()-t)/5*1e3:.1f} ms',flush=True)
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        step(); torch.cuda.synchronize()
    print(p.key_averages().table(sort_by='cuda_time_total',row_limit=14,max_name_column_width=60)[:5000].split('\n',3)[-1] if 0 else '\n'.join(f'{e.key[:70]:70s} {e.device_time_total/1e3:8.2f} ms x{e.count}' for e in sorted(p.key_averages(),key=lambda e:-e.device_time_total)[:14]),flush=True)
