"""The demo model's tokenizer: token b is the byte b, and three special tokens follow."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = 256, 257, 258
VOCABULARY_SIZE = 259
SPECIAL_TOKENS = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}

# Line breaks are in expressions because chat templates drop one that follows a block tag.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{{ '\\nAnswer: ' + message.content + eos_token }}"
    "{% else %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}{{ message.content }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAnswer: ' }}{% endif %}"
)


def byte_symbols() -> list[str]:
    """The printable symbol that byte-level tokenizers use for each byte, in byte order.

    Printable Latin-1 bytes stand for themselves; the others are, in order, the characters from
    U+0100 on, as in the byte-level vocabulary of Radford et al., "Language Models are Unsupervised
    Multitask Learners", 2019.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def byte_tokenizer(longest: int) -> PreTrainedTokenizerFast:
    """A lossless tokenizer of UTF-8 bytes that puts one <bos> first; `longest` is in tokens."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())} | SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
