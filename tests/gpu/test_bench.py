"""Every peer of `entmaxkv bench kernels` computes softmax attention over the same pages."""

import pytest
import torch

from entmaxkv_vllm.bench.batch import parse_batch
from entmaxkv_vllm.bench.peers import ARMS, Unavailable
from entmaxkv_vllm.bench.workload import Pool, Shape, Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("batch", ["3q1s1000_1q1s37", "2q300_1q20s500", "1q100_2q1s700"])
@pytest.mark.parametrize("peer", [name for name in ARMS if name != "sdpa"])
def test_a_peer_computes_what_torch_does(peer, batch):
    torch.manual_seed(0)
    requests = parse_batch(batch)
    pages = sum(-(-request.tokens // 16) for request in requests)
    work = Workload.over(Pool.of(Shape(8, 2, 128), 2 * pages * 16, "random"), requests, 2, 0.05)
    try:
        arms = ARMS[peer](work)
    except Unavailable as reason:
        pytest.skip(str(reason))
    (expected,) = ARMS["sdpa"](work).values()
    for steps in arms.values():
        for step, torchs in zip(steps, expected, strict=True):
            wanted = torch.cat([each[0].transpose(0, 1) for each in torchs()])
            torch.testing.assert_close(step(), wanted, rtol=2**-6, atol=2**-6)
