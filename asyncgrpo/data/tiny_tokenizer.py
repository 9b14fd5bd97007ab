"""The embedded tiny model's tokenizer: made in a moment, without torch."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS, PAD = "<|im_end|>", "<|endoftext|>"
KEYWORDS = ("Compute: ", "gcd: ", "Sort: ", "Palindrome: ", "Reverse: ", "Eval: ", "Check: ")
TURNS = (  # whole turn headers as single tokens: 2 tokens of overhead per prompt instead of 9
    "<|im_start|>system\n",
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_end|>\n",
    "<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, ChatML; digits with their space, task keywords and turn headers are one token.

    Any text round-trips. EOS is <|im_end|>, padding <|endoftext|>.
    """
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ġ", symbol) for symbol in "0123456789+-"]  # "Ġ" is the byte alphabet's space
    for space, symbol in merges:
        vocab[space + symbol] = len(vocab)
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    for special, texts in ((True, (PAD, "<|im_start|>", EOS)), (False, KEYWORDS), (True, TURNS)):
        add = raw.add_special_tokens if special else raw.add_tokens
        add([AddedToken(text, special=special, normalized=False) for text in texts])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
