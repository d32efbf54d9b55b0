"""What other libraries offer for the same job, at the same sizes. Each is imported when it is built; Missing says why
it can't be.

Model folders of other families are written by `bmojo.convert`, so theirs have the sizes of ours. No weights are loaded.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bmojo.bench.contest import Missing
from bmojo.config import ModelConfig
from bmojo.convert import FORMATS

# distribution by the name that it is imported under
PACKAGES = {
    "transformers": "transformers",
    "mambapy": "mambapy",
    "fla": "fla-core",
    "mamba_ssm": "mamba-ssm",
    "flash_attn": "flash-attn",
}
ON_GPU = {"fla", "mamba_ssm", "flash_attn"}


def versions() -> dict[str, str | None]:
    """Of each package, by distribution; None where it is not installed."""
    found: dict[str, str | None] = {}
    for distribution in PACKAGES.values():
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[distribution] = None
    return found


def load(module: str, device: str = "cpu") -> ModuleType:
    """A module of one of PACKAGES."""
    package = module.partition(".")[0]
    if package in ON_GPU and device != "cuda":
        raise Missing(f"{PACKAGES[package]} needs a CUDA device")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent = (error.name or module).partition(".")[0]
        raise Missing(f"not installed: {PACKAGES.get(absent, absent)}") from error


def modeling(name: str, device: str) -> ModuleType:
    """The file of a model of Transformers. Where other packages' GPU kernels are installed it takes these, which fail
    on a CPU; there the plain PyTorch functions that they stand for are put back."""
    load("transformers").logging.set_verbosity_error()
    module = load(f"transformers.models.{name}.modeling_{name}")
    if device != "cuda":
        for function, value in list(vars(module).items()):
            if inspect.isfunction(value) and (plain := inspect.unwrap(value)).__module__ == module.__name__:
                setattr(module, function, plain)
    return module


def transformers_model(
    config: ModelConfig, family: str, device: str, attention: str | None = None, **settings: Any
) -> Any:
    """A language model of Transformers with the sizes of `config`: "llama", "mamba2", ..."""
    transformers = load("transformers")
    modeling(family, device)
    theirs = transformers.AutoConfig.for_model(**FORMATS[family].write(config), **settings)
    options = {} if attention is None else {"attn_implementation": attention}
    if attention == "flash_attention_2":
        load("flash_attn", device)
    return transformers.AutoModelForCausalLM.from_config(theirs, **options).to(device)


def mamba2_layer(config: ModelConfig, device: str) -> Any:
    return transformers_model(config, "mamba2", device).backbone.layers[0].mixer


def mamba_layer(config: ModelConfig, device: str) -> Any:
    """Transformers' own scan is a loop whose backward pass takes the square of the length; it can borrow mambapy's."""
    load("mambapy.pscan")
    return transformers_model(config, "mamba", device, use_mambapy=True).backbone.layers[0].mixer


def qwen3_next_layer(config: ModelConfig, device: str) -> nn.Module:
    """The gated delta layer of Qwen3-Next with the sizes of `config`."""
    module = modeling("qwen3_next", device)
    theirs = module.Qwen3NextConfig(
        hidden_size=config.hidden_size,
        rms_norm_eps=config.norm_eps,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=config.ssm_groups,
        linear_num_value_heads=config.ssm_heads,
        linear_key_head_dim=config.ssm_state_size,
        linear_value_head_dim=config.ssm_head_dim,
        linear_conv_kernel_dim=config.ssm_conv,
    )
    return module.Qwen3NextGatedDeltaNet(theirs, 0).to(device)


def mambapy_layer(config: ModelConfig, device: str) -> nn.Module:
    """The Mamba-1 block of mambapy, as wide and with as large a state as `config`'s SSM."""
    module = load("mambapy.mamba")
    theirs = module.MambaConfig(
        d_model=config.hidden_size,
        n_layers=1,
        d_state=config.ssm_state_size,
        expand_factor=config.ssm_expand,
        d_conv=config.ssm_conv,
    )
    return module.MambaBlock(theirs).to(device)


# ops: functions of the arguments of ours
def qwen3_gated_delta(device: str, chunk_size: int) -> Callable[..., Tensor]:
    rule = modeling("qwen3_next", device).torch_chunk_gated_delta_rule
    return lambda q, k, v, beta, g: rule(q, k, v, g, beta, chunk_size=chunk_size)[0]


def fla_gated_delta(device: str) -> Callable[..., Tensor]:
    rule = load("fla.ops.gated_delta_rule", device).chunk_gated_delta_rule
    return lambda q, k, v, beta, g: rule(q, k, v, g, beta, scale=1.0)[0]


def fla_ssd(device: str) -> Callable[..., Tensor]:
    """SSD as gated linear attention: queries C, keys B, values dt x, log decays -dt exp(A_log), a head at a time."""
    scan = load("fla.ops.simple_gla", device).chunk_simple_gla

    def run(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor) -> Tensor:
        keys, queries = (z.repeat_interleave(x.shape[2] // z.shape[2], 2) for z in (B, C))
        return scan(queries, keys, x * dt[..., None].to(x.dtype), -dt * A_log.exp(), scale=1.0)[0]

    return run


def mamba_ssm_ssd(device: str, chunk_size: int) -> Callable[..., Tensor]:
    scan = load("mamba_ssm.ops.triton.ssd_combined", device).mamba_chunk_scan_combined
    return lambda x, dt, A_log, B, C: scan(x, dt, -A_log.exp(), B, C, chunk_size)


def mamba_ssm_s6(device: str) -> Callable[..., Tensor]:
    scan = load("mamba_ssm.ops.selective_scan_interface", device).selective_scan_fn
    return lambda x, dt, A_log, B, C: scan(
        *(z.transpose(1, 2).contiguous() for z in (x, dt)), -A_log.exp(), *(z.transpose(1, 2) for z in (B, C))
    )


def mambapy_s6(device: str) -> Callable[..., Tensor]:
    scan = load("mambapy.pscan").pscan
    return lambda *inputs: _s6(inputs, lambda decay, written: scan(decay, written))


def associative_scan_s6(device: str, compiled: bool) -> Callable[..., Tensor]:
    """PyTorch's own scan."""
    from torch._higher_order_ops.associative_scan import associative_scan

    mode = "pointwise" if device == "cuda" else "generic"

    def scan(decay: Tensor, written: Tensor) -> Tensor:
        return associative_scan(_after, (decay, written), dim=1, combine_mode=mode)[1]

    def run(*inputs: Tensor) -> Tensor:
        return _s6(inputs, scan)

    return torch.compile(run) if compiled else run


def _after(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two steps h -> decay h + written, as one."""
    return first[0] * second[0], second[0] * first[1] + second[1]


def _s6(inputs: tuple[Tensor, ...], scan: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mamba-1's scan with the states [batch, time, channels, state_size] written out."""
    x, dt, A_log, B, C = inputs
    decay = (-dt[..., None] * A_log.exp()).exp()
    return (scan(decay, (dt * x)[..., None] * B[:, :, None]) @ C[..., None]).squeeze(-1)


def flash_attention(device: str, window: int | None) -> Callable[..., Tensor]:
    """Causal attention over the last `window` tokens, of q, k, v [batch, time, heads, head_dim]."""
    attend = load("flash_attn", device).flash_attn_func
    reach = (-1, -1) if window is None else (window - 1, 0)
    return lambda q, k, v: attend(q, k, v, causal=True, window_size=reach)


def state_bytes(cache: Any) -> int:
    """Bytes of a cache of Transformers."""
    tensors: list[Tensor] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            tensors += [z for z in parts if isinstance(z, Tensor)]
    return sum(z.nbytes for z in tensors)
