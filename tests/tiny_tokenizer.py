"""A word tokenizer made in code, with or without a chat template."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def tiny_tokenizer(
    vocab_size: int = 97, chat: bool = False, more_words: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Words w5, w6, ... split at spaces; id 0 pads, id 1 is unknown, id 2 (`<end>`) ends a response."""
    words = ["<pad>", "<unk>", "<end>", "user", "assistant", *more_words]
    words += [f"w{i}" for i in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    fast.chat_template = TEMPLATE if chat else None
    return fast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, 258 in all; id 0 pads, id 1 ends a response."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


# ChatML with a system message by default, tools, and a switch as Qwen's templates have it.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% for call in message['tool_calls'] %}{{ call | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}(no thought)\n{% endif %}{% endif %}"
)


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """[`byte_tokenizer`] with turns between `<|im_start|>` (id 258) and `<|im_end|>` (id 259)."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer
