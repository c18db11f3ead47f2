"""Encoding a prompt: against transformers' own padded call, and against Wan's encoder written out."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from flashvsr.__main__ import main
from flashvsr.base.cli import UserError
from flashvsr.base.operators import declare_torchvision
from flashvsr.models.prompt import load_prompt
from flashvsr.weights.umt5 import WAN_FILE, WAN_TOKENIZER, clean, encode

WORDS = ["a", "film", "sharp", "cinematic", "grain", "no", "&", "<"]
HEADS, BUCKETS = 4, 32


@pytest.fixture(scope="module")
def umt5(tmp_path_factory):
    """A diffusers-like folder: a tiny random UMT5 in `text_encoder/`, a word tokenizer in `tokenizer/`."""
    declare_torchvision()
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("umt5")
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=16, d_model=12, d_kv=5, d_ff=20, num_layers=3, num_heads=HEADS, dropout_rate=0.0,
        relative_attention_num_buckets=BUCKETS, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = transformers.UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    model.save_pretrained(folder / "text_encoder")
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {w: i + 3 for i, w in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder / "tokenizer")
    return folder, model, fast


def padded(model, tokenizer, text, length):
    """As diffusers' pipeline calls it: padded, masked, then zero behind the text."""
    given = tokenizer(
        [text], padding="max_length", max_length=length, truncation=True, return_attention_mask=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        states = model(given.input_ids, given.attention_mask).last_hidden_state
    return states * given.attention_mask[..., None], int(given.attention_mask.sum())


@pytest.mark.parametrize("text", ["a sharp cinematic film", "grain", "no " * 60])
def test_an_encoder_of_transformers(umt5, text):
    folder, model, tokenizer = umt5
    expected, tokens = padded(model, tokenizer, text, 20)
    got, count = encode(text, folder, length=20, dtype=torch.float32)
    assert got.shape == (1, 20, 12) and count == tokens
    assert (got - expected).abs().max() < 1e-5 and expected.std() > 0.1
    assert (got[:, count:] == 0).all()


def wan_state(model):
    """The encoder's tensors under Wan's names (its wan/modules/t5.py)."""
    named = {}
    for name, tensor in model.state_dict().items():
        if name == "encoder.embed_tokens.weight":
            continue
        block = re.match(r"encoder\.block\.(\d+)\.layer\.(\d)\.(.*)", name)
        if block is None:
            named[{"shared.weight": "token_embedding.weight"}.get(name, "norm.weight")] = tensor
            continue
        i, half, leaf = block.groups()
        if leaf == "layer_norm.weight":
            leaf = f"norm{int(half) + 1}.weight"
        for theirs, wan in (
            ("SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
            ("SelfAttention", "attn"), ("DenseReluDense.wi_0", "ffn.gate.0"),
            ("DenseReluDense.wi_1", "ffn.fc1"), ("DenseReluDense.wo", "ffn.fc2"),
        ):  # fmt: skip
            leaf = leaf.replace(theirs, wan)
        named[f"blocks.{i}.{leaf}"] = tensor.clone()
    return named


def wan_encoder(state, ids):
    """Wan's T5Encoder written out (released wan/modules/t5.py): one text, no padding."""

    def norm(x, weight):
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    n = len(ids)
    offset = torch.arange(n)[None] - torch.arange(n)[:, None]
    half, exact = BUCKETS // 2, BUCKETS // 4
    far = (
        exact
        + (
            torch.log(offset.abs().clamp(min=1).float() / exact) / math.log(128 / exact) * (half - exact)
        ).long()
    )
    bucket = torch.where(offset.abs() < exact, offset.abs(), far.clamp(max=half - 1)) + (offset > 0) * half
    x = state["token_embedding.weight"][ids]
    for i in range(3):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        y = norm(x, w["norm1.weight"])
        q, k, v = ((y @ w[f"attn.{c}.weight"].T).unflatten(-1, (HEADS, -1)).transpose(0, 1) for c in "qkv")
        bias = w["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        o = ((q @ k.mT + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + o @ w["attn.o.weight"].T
        y = norm(x, w["norm2.weight"])
        y = (y @ w["ffn.fc1.weight"].T) * F.gelu(y @ w["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + y @ w["ffn.fc2.weight"].T
    return norm(x, state["norm.weight"])


@pytest.fixture
def wan_folder(umt5, tmp_path):
    """A Wan2.1 folder's text encoder: the .pth file and its tokenizer's folder."""
    folder, model, tokenizer = umt5
    torch.save(wan_state(model), tmp_path / WAN_FILE)
    tokenizer.save_pretrained(tmp_path / WAN_TOKENIZER)
    return tmp_path


def test_the_file_of_wan(umt5, wan_folder):
    _, model, tokenizer = umt5
    text = "a sharp cinematic film " * 6  # further apart than the exact buckets reach
    ids = torch.tensor(tokenizer(text).input_ids)
    expected = wan_encoder(wan_state(model), ids)
    for path in (wan_folder, wan_folder / WAN_FILE):
        got, count = encode(text, path, length=40, dtype=torch.float32)
        assert count == len(ids) == 25
        assert (got[0, :count] - expected).abs().max() < 1e-5
    assert (padded(model, tokenizer, text, 40)[0] - got).abs().max() < 1e-5


def test_the_command(umt5, wan_folder, tmp_path, capsys):
    out = tmp_path / "posi_prompt.pth"
    main(["prompt", "a  film &amp;lt; grain", "--umt5", str(wan_folder), "--out", str(out)])
    assert capsys.readouterr().out.strip() == f"{out}: 5 tokens, (1, 512, 12) bfloat16"
    stored = torch.load(out, weights_only=True)
    assert stored.dtype == torch.bfloat16
    expected, _ = encode("a film < grain", umt5[0], dtype=torch.float32)
    assert (load_prompt(out, 12) - expected).abs().max() < 0.1 * expected.abs().max()
    with pytest.raises(UserError, match="already exists; --force replaces it"):
        main(["prompt", "a film", "--umt5", str(wan_folder), "--out", str(out)])
    (tmp_path / "text.txt").write_text("a film\n< grain")
    command = ["prompt", f"@{tmp_path / 'text.txt'}", "--umt5", str(umt5[0]), "--out", str(out), "--force"]
    main([*command, "--dtype", "float32", "--length", "3"])
    assert capsys.readouterr().out.strip() == f"{out}: 3 tokens, cut there, (1, 3, 12) float32"
    assert (load_prompt(out)[:, :2] - expected[:, :2]).abs().max() > 0  # cut, so other neighbours


def test_text_is_cleaned():
    assert clean(" a\n\tfilm &amp;amp; grain ") == "a film & grain"
    pytest.importorskip("ftfy")
    assert clean("caf\u00c3\u00a9 \u201cx\u201d") == 'caf\u00e9 "x"'


def test_what_is_missing_or_another_encoder(umt5, wan_folder, tmp_path):
    def fails(sentence, path, text="a film", **how):
        with pytest.raises(UserError, match=sentence):
            encode(text, path, **how)

    fails("the prompt is empty", umt5[0], text=" \n")
    fails("nowhere does not exist", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    fails("holds no UMT5: neither config.json nor text_encoder/ nor models_t5", tmp_path / "empty")
    fails("no tokenizer .* in .*empty; give its folder", umt5[0], tokenizer=tmp_path / "empty")
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    fails(
        "is a t5 model; the prompt of Wan2.1 is encoded by UMT5",
        tmp_path / "t5",
        tokenizer=umt5[0] / "tokenizer",
    )
    path = wan_folder / WAN_FILE
    state = torch.load(path, weights_only=True)
    del state["blocks.1.attn.q.weight"]
    torch.save(state, path)
    fails("does not fit this UMT5EncoderModel: missing: encoder.block.1.layer.0.SelfAttention.q.weight", path)
    path.write_bytes(path.read_bytes()[:500])
    fails("is not a whole file", path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    fails("is a git-lfs pointer", path)
    torch.save({"encoder.conv1.weight": torch.zeros(1)}, path)
    fails("is not Wan's UMT5 file", path)


def test_prompt_keys_and_values_are_computed_once(micro_model):
    """Whatever is streamed, the text MLP and the prompt's k and v run once per model."""
    from flashvsr import StreamingUpscaler

    model = micro_model()
    calls = []
    layers = [model.dit.text_embedding, *(b.cross_attn.k for b in model.dit.blocks)]
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    upscaler = StreamingUpscaler(model, scale=2)
    frames = torch.randint(0, 256, (40, 16, 32, 3), dtype=torch.uint8).numpy()
    upscaler.push(frames)
    upscaler.flush()
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(layers)
