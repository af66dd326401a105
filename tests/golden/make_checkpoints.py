"""Make the golden files of the loader: tiny random checkpoints and tokenizers, and what they give.

`transformers` writes them, and says what they compute:

    pip install transformers==5.23.0 sentencepiece tiktoken
    python tests/golden/make_checkpoints.py
    pip install transformers==4.46.3                # the same again, for the older layouts
    python tests/golden/make_checkpoints.py

Every directory gets the model's files and expected.npz: tokens (1, T), for T5 also target (1, T),
logits, and 16 greedy tokens.
"""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

HERE = Path(__file__).parent
OLD = transformers.__version__.startswith("4.")
V = 260
LLAMA = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,
    rms_norm_eps=1e-5,
)
T5 = dict(
    vocab_size=V,
    d_model=32,
    d_kv=12,
    d_ff=48,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    decoder_start_token_id=0,
)
SCALING = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


def make(name, model, seed, dtype=torch.float32, **how):
    """Random weights, saved by `transformers`, and what they compute."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.data = (torch.randn_like(weight) * 0.3 + (weight.ndim == 1)).to(dtype)
    model.config.torch_dtype = dtype  # to be written down
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.eval().save_pretrained(folder, **how)
    (folder / "generation_config.json").unlink()
    model.float()
    tokens = torch.randint(3, V, (1, 24))
    expected, given = {"tokens": tokens}, tokens.shape[1]
    if isinstance(model, T5ForConditionalGeneration):
        expected["target"] = torch.cat(
            [torch.zeros(1, 1, dtype=torch.int64), torch.randint(3, V, (1, 11))], dim=1
        )
        logits, given = (
            lambda x: model(input_ids=tokens, decoder_input_ids=x, use_cache=False).logits,
            1,
        )
        x = expected["target"]
    else:
        logits, x = lambda x: model(x, use_cache=False).logits, tokens
    expected["logits"], x = logits(x), x if x is tokens else x[:, :1]
    for _ in range(16):
        x = torch.cat([x, logits(x)[:, -1:].argmax(dim=-1)], dim=1)
    expected["greedy"] = x[0, given:]
    np.savez(folder / "expected.npz", **{key: value.numpy() for key, value in expected.items()})
    print(name, *sorted(f.name for f in folder.iterdir()))


def checkpoints():
    if OLD:
        make("llama-old", LlamaForCausalLM(LlamaConfig(**LLAMA, rope_theta=500.0)), 1)
        make(
            "llama-old-bin",
            LlamaForCausalLM(LlamaConfig(**LLAMA)),
            2,
            torch.float16,
            safe_serialization=False,
        )
        make(
            "llama-old-scaled-sharded-bin",
            LlamaForCausalLM(
                LlamaConfig(
                    **LLAMA,
                    tie_word_embeddings=True,
                    rope_scaling=dict(rope_type="llama3", **SCALING),
                )
            ),
            3,
            torch.bfloat16,
            safe_serialization=False,
            max_shard_size="20KB",
        )
        make(
            "t5-1.0-old-bin",
            T5ForConditionalGeneration(T5Config(**T5)),
            4,
            safe_serialization=False,
        )
        make(
            "t5-1.1-old",
            T5ForConditionalGeneration(
                T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
            ),
            5,
        )
    else:
        make("llama-new", LlamaForCausalLM(LlamaConfig(**LLAMA)), 6)
        make(
            "llama-new-tied-scaled-sharded",
            LlamaForCausalLM(
                LlamaConfig(
                    **LLAMA,
                    head_dim=12,
                    tie_word_embeddings=True,
                    rope_parameters=dict(rope_type="llama3", rope_theta=300.0, **SCALING),
                )
            ),
            7,
            torch.bfloat16,
            max_shard_size="20KB",
        )
        make("t5-1.0-new", T5ForConditionalGeneration(T5Config(**T5)), 8)
        make(
            "t5-1.1-new",
            T5ForConditionalGeneration(
                T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
            ),
            9,
            torch.bfloat16,
        )


SENTENCES = """
A gist is the part of a text that matters. The model reads the prompt once and keeps a few tokens of it.
Instruction: Reverse the list of words. Input: apple bread castle door Output: door castle bread apple
In 1492 they sailed; in 1969 they landed; 3.14159 is close to pi, and 2**10 == 1024.
def forward(self, x):    return self.w2(F.silu(self.w1(x)) * self.w3(x))
Où est la bibliothèque? Das Mädchen aß süße Äpfel. El niño comió piñas. Čeština má háčky. Привет, мир! Γειά σου Κόσμε.
我喜欢读书。 東京は大きい都市です。 나는 책을 읽습니다. שלום עולם مرحبا بالعالم नमस्ते दुनिया
It's what we've said: don't, can't, won't; they'll, I'm, you're, he'd. IT'S WHAT WE'VE SAID.
""".strip().split("\n")  # noqa: E501
HARD = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n  \n",
    "\t\ttabs\tand  spaces   ",
    "  leading and trailing  ",
    "Hello, world!",
    "a  b   c    d",
    "line one\nline two\r\nline three\n\n\nend",
    "1",
    "12",
    "123",
    "1234567890",
    "3.14159 and 2**10==1024",
    "v1.2.3-rc4 100,000 7th",
    "½ ² Ⅷ ٣ 四",
    "café cafe\u0301 naïve Ångström ß Æ",
    "我喜欢读书。東京は大きい。",
    "나는 책을 읽습니다",
    "שלום مرحبا नमस्ते",
    "😀 👍🏽 🇪🇺 👩‍👩‍👧‍👦",
    "zero\u200dwidth\u200bjoiner\ufeff",
    "nbsp\u00a0thin\u2009ideographic\u3000space",
    "\u0000\u0001\u0007\u001b\u001c\u007f\u0085",
    "don't DON'T we'll WE'LL it's IT'S I'd 'tis ''s",
    "def f(x):\n    return x**2  # comment\n\n\tif x: pass",
    "<s> </s> <unk> <|endoftext|> <extra_id_0> [INST]",
    "▁ lower one eighth block ▁▁",
    "\U0003fffd \U0010ffff \ue000",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "http://example.com/?q=a&b=c#d",
    "ﬁ ｆｕｌｌｗｉｄｔｈ ①",
    "ends with newline\n",
    "{}[]()<>|\\/~`^",
]
ADDED = [
    "if x:\n    return 1\n        # six      spaces, five     spaces",
    "<think>\n\nI don't</think>  <|late|>  日本<|end|>don'tthink <think</think>",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentencepiece_model(file, kind, size):
    """LLaMA's kind (byte-pair encoding, bytes, text as it is) or T5's.

    T5's: unigram, no bytes, normalized, no token for the beginning of a text.
    """
    import sentencepiece

    llama = dict(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=0.99,
    )
    t5 = dict(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=f,
            vocab_size=size,
            hard_vocab_limit=False,
            minloglevel=2,
            **(llama if kind == "llama" else t5),
        )


def byte_level_bpe(folder, pre_tokenizer, text_tokens=(), **how):
    """A tokenizer.json, with a token for every byte or, as SmolLM2's, for those that came up.

    text_tokens: added tokens that are not special.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizer, decoders.ByteLevel()
    t.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=["<|end|>", "<|start|>"], show_progress=False, **how
        ),
    )
    t.add_tokens([AddedToken("<|late|>", special=True), *text_tokens])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token="<|start|>", eos_token="<|end|>"
    )
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def expect(folder, reference, texts=HARD):
    """Write down the reference's ids of hard strings, and its text of ids, some of no text."""
    ids = [
        reference.encode(text, add_special_tokens=False, split_special_tokens=True)
        for text in texts
    ]
    rows = ids + [row[1::2] for row in ids] + [list(range(3, 40)), list(range(100, 140))]
    decoded = [
        reference.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for row in rows
    ]
    (folder / "expected.json").write_text(
        json.dumps({"ids": list(zip(texts, ids)), "texts": list(zip(decoded, rows))})
    )


def tokenizers():
    """Small tokenizers of every kind.

    Newer versions no longer use the sentencepiece library, and differ from it where a text begins
    with spaces.
    """
    root = HERE / "tokenizers"
    if OLD:
        sentencepiece_model(root / "llama" / "tokenizer.model", "llama", 500)
        sentencepiece_model(root / "t5" / "spiece.model", "t5", 300)
        expect(
            root / "llama",
            transformers.LlamaTokenizer(str(root / "llama" / "tokenizer.model"), legacy=False),
        )
        expect(
            root / "t5", transformers.T5Tokenizer(str(root / "t5" / "spiece.model"), legacy=False)
        )
        return
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre
    from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

    cut = pre.Split(Regex(LLAMA3), "isolated")
    # As in SmolLM2, some bytes that text hardly has are no tokens: control characters, and those
    # that UTF-8 does not use.
    rare = {chr(256 + b) for b in range(1, 9)} | {chr(b) for b in range(0xF5, 0x100)}
    byte_level_bpe(
        root / "plain",
        pre.ByteLevel(add_prefix_space=False),
        initial_alphabet=[c for c in pre.ByteLevel.alphabet() if c not in rare],
    )
    byte_level_bpe(
        root / "digits",
        pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]),
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    byte_level_bpe(
        root / "llama3",
        pre.Sequence([cut, pre.ByteLevel(add_prefix_space=False, use_regex=False)]),
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    byte_level_bpe(
        root / "added",
        pre.ByteLevel(add_prefix_space=False),
        text_tokens=["  ", "    ", "<think>", "</think>", "日本", "don't", "\n\n"],
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    for name in ("plain", "digits", "llama3", "added"):
        reference = transformers.PreTrainedTokenizerFast.from_pretrained(root / name)
        expect(root / name, reference, HARD + ADDED if name == "added" else HARD)

    file = root / "tiktoken" / "tokenizer.model"
    file.parent.mkdir(exist_ok=True)
    vocab = json.loads((root / "llama3" / "tokenizer.json").read_text())["model"]["vocab"]
    byte = {c: b for b, c in bytes_to_unicode().items()}
    tokens = [
        bytes(byte[c] for c in token)
        for token in sorted(vocab, key=vocab.get)
        if not token.startswith("<|")
    ]
    file.write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    )
    expect(
        file.parent,
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=TikTokenConverter(vocab_file=str(file), pattern=LLAMA3).converted()
        ),
    )


if __name__ == "__main__":
    with torch.no_grad():
        checkpoints()
    tokenizers()
