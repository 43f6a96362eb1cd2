"""Weights in every format that is read, each beside a safetensors file with the same values in float32."""

import collections
import shutil

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from tiny_bert import tiny_config, write_model_folder


def odd_tensors():
    """Returns tensors by name in every layout and type that a file may hold, and attributes as a `state_dict` has them."""
    base = torch.randn(4, 6)
    state = collections.OrderedDict(
        plain=base,
        shared=base,
        transposed=base.t(),
        rows=base[1:3],
        columns=base[:, 2:5],
        stepped=base[::2, 1::2],
        element=base[3, 5],
        repeated=torch.randn(1, 3).expand(2, 3),
        permuted=torch.randn(2, 3, 4).permute(2, 0, 1),
        scalar=torch.tensor(-0.5),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(torch.randn(3)),
        half=torch.randn(2, 3, dtype=torch.float16).t(),
        bfloat16=torch.randn(5, dtype=torch.bfloat16)[1:],
        double=torch.randn(2, 2, dtype=torch.float64),
        integers=torch.arange(3),
        flags=torch.tensor([True, False]),
    )
    state._metadata = collections.OrderedDict([("", {"version": 1})])
    return state


def in_float32(state):
    """Returns the floating-point tensors of `state`, each on its own in float32."""
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    return {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in floating.items()}


def save_legacy(state, path):
    """Writes `state` as torch did before 1.6. A file that holds the same stays: addresses of memory are names in it."""
    if path.exists():
        there = torch.load(path, weights_only=True)
        if there.keys() == state.keys() and all(
            there[name].dtype == tensor.dtype
            and there[name].stride() == tensor.stride()
            and torch.equal(there[name], tensor)
            for name, tensor in state.items()
        ):
            return
    torch.save(state, path, _use_new_zipfile_serialization=False)


def old_names(model):
    """Returns the `state_dict` of a BERT with its pretraining heads, as it was called when BERT was new."""
    state = collections.OrderedDict()
    for name, tensor in model.state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state[name] = tensor
    state["bert.embeddings.position_ids"] = torch.arange(40).reshape(1, 40)
    return state


def write_weights(folder):
    """Writes the folder of these fixtures.

    odd/model.safetensors, archive.bin, legacy.bin      `odd_tensors` in float32; as they are, in both forms of torch.save
    shards/model.safetensors                            five tensors
    shards/*.index.json and the files that they name    the same in shards, as safetensors and by torch.save
    old_bert/pytorch_model.bin                          a BERT with pretraining heads and names of 2018, before torch 1.6
    old_bert/twin.safetensors                           its encoder under the names of today
    """
    torch.manual_seed(21)
    (folder / "odd").mkdir(parents=True, exist_ok=True)
    state = odd_tensors()
    save_file(in_float32(state), folder / "odd" / "model.safetensors")
    torch.save(state, folder / "odd" / "archive.bin")
    save_legacy(state, folder / "odd" / "legacy.bin")

    shards = folder / "shards"
    shutil.rmtree(shards, ignore_errors=True)
    shards.mkdir()
    state = {f"layer.{index}.weight": torch.randn(3, index + 2) for index in range(5)}
    for safe in (True, False):
        save_torch_state_dict(state, shards, max_shard_size=100, safe_serialization=safe)
    save_file(state, shards / "model.safetensors")

    bert = folder / "old_bert"
    config = tiny_config(
        hidden_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=12,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
    )
    model = transformers.BertForPreTraining(config).eval()
    legacy = bert / "pytorch_model.bin"
    before = legacy.read_bytes() if legacy.exists() else None
    write_model_folder(bert, model)
    (bert / "model.safetensors").unlink()
    if before is not None:
        legacy.write_bytes(before)
    save_legacy(old_names(model), legacy)
    encoder = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("bert.")}
    save_file(in_float32(encoder), bert / "twin.safetensors")
