"""Checkpoints of the Diffusion Policy code base: read without running what is in them, taken apart for our policies.

The authors' training saves {cfg, state_dicts {model, ema_model, optimizer}, pickles {global_step, epoch}} with
torch.save and dill. Such a file is a pickle, and a pickle may call anything. So `load_reference_checkpoint` reads it
with an unpickler that knows a few names, each standing for plain data, and refuses every other one:

    file -- load_reference_checkpoint --> cfg, tensors by key -- reference_policy_parts --> configs, weights, statistics

Longer than most files here, as it holds both halves: the reading, which knows no policy, and the mapping, which knows
no pickle.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpolicy.denoisers.transformer import TransformerConfig
from diffpolicy.denoisers.unet import UnetConfig
from diffpolicy.encoders.resnet import ResnetConfig
from diffpolicy.encoders.state import StateConfig

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
OMEGACONF_NAMES = {
    "omegaconf.dictconfig": {"DictConfig"},
    "omegaconf.listconfig": {"ListConfig"},
    "omegaconf.base": {"Metadata", "ContainerMetadata"},
    "omegaconf.nodes": {"AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode"},
}
"""Classes that a pickled cfg is made of; none of them is imported, all become a _Node."""
TYPE_NAMES = {"dict", "list", "tuple", "int", "long", "float", "bool", "str", "unicode", "object"}
"""Builtin types that omegaconf's bookkeeping mentions, under old names too; they become their names."""


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """What load_reference_checkpoint found, as plain data."""

    path: Path
    cfg: dict[str, Any]
    """The training's configuration."""
    state_dicts: dict[str, dict[str, Tensor]]
    """`model`, and `ema_model` where the training kept one: parameter name -> tensor, on the CPU."""
    global_step: int | None
    epoch: int | None


class _Node:
    """Stands for every omegaconf class: keeps the state it was pickled with and does nothing."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


class _Storage(NamedTuple):
    """Where a tensor's numbers lie in the archive."""

    dtype: torch.dtype
    key: str
    numel: int


class _TensorRecord(NamedTuple):
    """A tensor before its numbers are read, so that the optimiser's never are."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _allowed_globals() -> dict[tuple[str, str], Any]:
    """(module, name) in a pickle -> what it means here. Made anew for each file, so that one cannot spoil the next."""
    node = type("Node", (_Node,), {})
    allowed: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): lambda *_: {},  # omegaconf's resolver cache
        ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: _TensorRecord(
            storage, offset, size, stride
        ),
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how protocol 2 writes bytes
        ("typing", "Any"): "Any",
        ("dill._dill", "_load_type"): lambda name: str(name),
    }
    allowed |= {("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()}
    allowed |= {("builtins", name): name for name in TYPE_NAMES}
    allowed |= {(module, name): node for module, names in OMEGACONF_NAMES.items() for name in names}
    return allowed


class _RestrictedUnpickler(pickle.Unpickler):
    """Knows the names in _allowed_globals; a ValueError names any other, and nothing of it is imported or called."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self._allowed = _allowed_globals()

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # protocol 2, torch.save's, has Python 2's name
        try:
            return self._allowed[module, name]
        except KeyError:
            raise ValueError(f"it asks for {module}.{name}, which is not plain data; refused, and not run") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"it holds a persistent object of unknown kind {kind!r}")
        return _Storage(dtype, str(key), int(numel))


def load_reference_checkpoint(path: str | Path) -> ReferenceCheckpoint:
    """Reads a checkpoint of the Diffusion Policy code base without running anything in it.

    Raises:
        ValueError: no such file; not a zip archive of torch.save (torch before 1.6 wrote another format); damaged; not
            the payload of that code base; or it asks for a global that is not plain data, which the message names.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            cut = file.read(2) == b"PK"
        if cut:
            raise ValueError(f"{path} is cut short: the end of its zip archive is missing; copy it again")
        raise ValueError(
            f"{path} is not a zip archive of torch.save; save a file of torch before 1.6 again with a newer torch"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_payload(path, archive)
    except Exception as error:  # a damaged or hostile pickle can fail in any way: all of them mean the same
        message = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read as a Diffusion Policy checkpoint: {message}") from error


def _read_payload(path: Path, archive: zipfile.ZipFile) -> ReferenceCheckpoint:
    members = {member.filename: member for member in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError(f"torch.save writes one <name>/data.pkl, got {pickles}")
    root = pickles[0].removesuffix("/data.pkl")
    packed = [name for name, member in members.items() if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"torch.save compresses nothing, but {packed[0]} is compressed")
    if f"{root}/byteorder" in members and archive.read(f"{root}/byteorder") != b"little":
        raise ValueError("its numbers are big-endian")

    payload = _RestrictedUnpickler(archive.read(pickles[0])).load()
    if not isinstance(payload, dict) or not {"cfg", "state_dicts"} <= payload.keys():
        found = sorted(map(str, payload)) if isinstance(payload, dict) else type(payload).__name__
        raise ValueError(f"its payload must have `cfg` and `state_dicts`, got {found}")
    cfg = _plain(payload["cfg"])
    if not isinstance(cfg, dict):
        raise ValueError(f"cfg must be a mapping, got {type(cfg).__name__}")
    state_dicts = {}
    for name in ("model", "ema_model"):
        if name in payload["state_dicts"]:
            records = payload["state_dicts"][name].items()
            state_dicts[name] = {key: _read_tensor(key, record, archive, root) for key, record in records}
    if "model" not in state_dicts:
        raise ValueError(f"state_dicts must have `model`, got {sorted(payload['state_dicts'])}")
    counters = {
        name: _RestrictedUnpickler(data).load()
        for name, data in payload.get("pickles", {}).items()
        if name in ("global_step", "epoch")
    }
    for name, value in counters.items():
        if type(value) is not int:
            raise ValueError(f"pickles.{name} must be an integer, got {type(value).__name__}")
    return ReferenceCheckpoint(path, cfg, state_dicts, counters.get("global_step"), counters.get("epoch"))


def _plain(value: Any) -> Any:
    """omegaconf's nodes as dicts, lists and scalars; interpolations stay the strings they are."""
    if isinstance(value, _Node):
        state = value.__dict__["state"]
        return _plain(state["_content"] if "_content" in state else state["_val"])
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"cfg must hold plain values, got {type(value).__name__}")


def _read_tensor(key: str, record: Any, archive: zipfile.ZipFile, root: str) -> Tensor:
    """The tensor that a record describes; its place is checked against what the archive really holds."""
    if not isinstance(record, _TensorRecord) or not isinstance(record.storage, _Storage):
        raise ValueError(f"{key} must be a tensor, got {type(record).__name__}")
    storage, offset, size, stride = record.storage, record.offset, tuple(record.size), tuple(record.stride)
    numbers = (offset, *size, *stride)
    if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
        raise ValueError(f"{key} has an impossible layout: size {size}, stride {stride}, offset {offset}")
    data = bytearray(archive.read(f"{root}/data/{storage.key}"))  # zipfile checks its CRC
    numel = len(data) // storage.dtype.itemsize
    if numel != storage.numel:
        raise ValueError(f"{key} must have {storage.numel} stored numbers, got {numel}")
    if 0 in size:
        return torch.empty(size, dtype=storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= numel:
        raise ValueError(f"{key} of size {size} reaches beyond its {numel} stored numbers")
    return torch.frombuffer(data, dtype=storage.dtype).as_strided(size, stride, offset).contiguous()


@dataclass(frozen=True)
class LinearMap:
    """One key of the reference's normaliser: x_norm = x * scale + offset, per dimension."""

    scale: Tensor
    """(D,)"""
    offset: Tensor
    """(D,)"""
    stats: dict[str, Tensor] = field(default_factory=dict)
    """min, max, mean, std of the training data, each (D,), in physical units."""


@dataclass(frozen=True, kw_only=True)
class ReferencePolicyParts:
    """A reference policy, taken apart: what our policy of the same kind is built from."""

    kind: str
    """Our denoiser's name: unet or transformer."""
    denoiser_config: UnetConfig | TransformerConfig
    denoiser_state: dict[str, Tensor]
    """Loads strictly into our denoiser."""
    encoder: str
    """Our encoder's name: state or resnet."""
    encoder_config: StateConfig | ResnetConfig
    encoder_state: dict[str, Tensor]
    """Loads strictly into our encoder; empty for state."""
    action_dim: int
    state_shapes: dict[str, tuple[int, ...]]
    """The reference's names of low-dimensional observations -> shape of one frame, in the order of concatenation."""
    image_shapes: dict[str, tuple[int, int, int]]
    """The reference's names of cameras -> (H, W, 3), in the order of concatenation."""
    obs_horizon: int
    pred_horizon: int
    act_horizon: int
    past: int
    """First executed step of a chunk: obs_horizon - 1, unless the checkpoint says otherwise."""
    normalizer: dict[str, LinearMap]
    """The reference's key (`obs`, `action`, ...) -> its map; cameras are scaled by our encoder instead."""
    noise_scheduler: dict[str, Any]
    """The scheduler's settings as the checkpoint has them: beta_schedule, clip_sample, variance_type, ..."""
    num_train_timesteps: int
    beta_schedule: str
    prediction_type: str
    num_inference_steps: int
    ema: bool
    """True: the weights are the moving average, which the reference evaluates."""


def reference_policy_parts(checkpoint: ReferenceCheckpoint) -> ReferencePolicyParts:
    """Maps a reference checkpoint onto our configs and state dicts.

    Sizes are read off the weights, choices that leave no trace in them (groups, heads, horizons) off cfg. Known are the
    U-Net and Transformer policies over low-dimensional observations and the U-Net policy over images (hybrid).

    Raises:
        ValueError: another policy or variant, a setting that is missing, or a key that would be left out.
    """
    cfg = checkpoint.cfg
    policy_class = str(_setting(cfg, "policy", "_target_")).rpartition(".")[2]
    ema = bool(_setting(cfg, "training", "use_ema", default=True)) and "ema_model" in checkpoint.state_dicts
    # Parameters without numbers are how the reference finds out its device.
    weights = {
        key: tensor
        for key, tensor in checkpoint.state_dicts["ema_model" if ema else "model"].items()
        if not (key.rpartition(".")[2] == "_dummy_variable" and tensor.numel() == 0)
    }
    denoiser_state = _take_prefix(weights, "model.")
    normalizer = _normalizer(_take_prefix(weights, "normalizer.params_dict."))
    obs_horizon = int(_setting(cfg, "policy", "n_obs_steps"))
    act_horizon = int(_setting(cfg, "policy", "n_action_steps"))
    pred_horizon = int(_setting(cfg, "policy", "horizon"))
    past = obs_horizon - 1
    encoder, encoder_config, encoder_state, image_shapes = "state", StateConfig(), {}, {}

    if policy_class == "DiffusionUnetLowdimPolicy":
        _require(cfg, "obs_as_global_cond", True)
        kind, denoiser_config = "unet", _unet_config(denoiser_state, int(_setting(cfg, "policy", "model", "n_groups")))
        if not _setting(cfg, "policy", "oa_step_convention", default=False):
            past = obs_horizon
        state_shapes = {"obs": (int(_setting(cfg, "policy", "obs_dim")),)}
    elif policy_class == "DiffusionTransformerLowdimPolicy":
        _require(cfg, "obs_as_cond", True)
        kind, denoiser_config = "transformer", _transformer_config(denoiser_state, _setting(cfg, "policy", "model"))
        state_shapes = {"obs": (int(_setting(cfg, "policy", "obs_dim")),)}
    elif policy_class == "DiffusionUnetHybridImagePolicy":
        _require(cfg, "obs_as_global_cond", True)
        kind, denoiser_config = "unet", _unet_config(denoiser_state, int(_setting(cfg, "policy", "n_groups")))
        image_shapes, state_shapes = _observations(_setting(cfg, "policy", "shape_meta", "obs"))
        encoder = "resnet"
        encoder_config, encoder_state = _resnet(cfg, _take_prefix(weights, "obs_encoder.obs_nets."), list(image_shapes))
        for camera in image_shapes:
            scaling = normalizer.pop(camera)
            if not bool((scaling.scale == 2).all() and (scaling.offset == -1).all()):
                raise ValueError(f"the normaliser of {camera} must map [0, 1] to [-1, 1], got another map")
    else:
        raise ValueError(
            "policy._target_ must be DiffusionUnetLowdimPolicy, DiffusionTransformerLowdimPolicy or "
            f"DiffusionUnetHybridImagePolicy, got {policy_class!r}"
        )
    if weights:
        raise ValueError(f"{len(weights)} keys of {checkpoint.path} have no place in our policy: {_some(weights)}")
    if missing := {"action", *state_shapes} - normalizer.keys():
        raise ValueError(f"the normaliser must have {sorted(missing)}, got {sorted(normalizer)}")
    if _setting(cfg, "policy", "pred_action_steps_only", default=False):
        pred_horizon, past = act_horizon, 0
    head = "final_conv.1.weight" if kind == "unet" else "head.weight"
    noise_scheduler = _setting(cfg, "policy", "noise_scheduler")
    num_train_timesteps = int(_setting(cfg, "policy", "noise_scheduler", "num_train_timesteps"))
    return ReferencePolicyParts(
        kind=kind,
        denoiser_config=denoiser_config,
        denoiser_state=denoiser_state,
        encoder=encoder,
        encoder_config=encoder_config,
        encoder_state=encoder_state,
        action_dim=_shape(denoiser_state, head)[0],
        state_shapes=state_shapes,
        image_shapes=image_shapes,
        obs_horizon=obs_horizon,
        pred_horizon=pred_horizon,
        act_horizon=act_horizon,
        past=past,
        normalizer=normalizer,
        noise_scheduler=noise_scheduler,
        num_train_timesteps=num_train_timesteps,
        beta_schedule=str(_setting(cfg, "policy", "noise_scheduler", "beta_schedule")),
        prediction_type=str(_setting(cfg, "policy", "noise_scheduler", "prediction_type")),
        num_inference_steps=int(_setting(cfg, "policy", "num_inference_steps", default=None) or num_train_timesteps),
        ema=ema,
    )


_NO_DEFAULT: Any = object()


def _setting(cfg: dict[str, Any], *keys: str, default: Any = _NO_DEFAULT) -> Any:
    """cfg[keys[0]][keys[1]]...; a ValueError names what is missing or was never resolved."""
    value: Any = cfg
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            if default is _NO_DEFAULT:
                raise ValueError(f"the checkpoint's cfg must have {'.'.join(keys)}")
            return default
        value = value[key]
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"the checkpoint's cfg.{'.'.join(keys)} must be resolved, got {value!r}")
    return value


def _require(cfg: dict[str, Any], name: str, wanted: bool) -> None:
    got = _setting(cfg, "policy", name, default=None)
    if got is not wanted:
        raise ValueError(f"policy.{name} must be {wanted} (we have no policy of the other kind), got {got}")


def _some(keys: Any) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")


def _take_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Moves every key under a prefix out of weights, and drops the prefix."""
    keys = [key for key in weights if key.startswith(prefix)]
    return {key.removeprefix(prefix): weights.pop(key) for key in keys}


def _shape(state: dict[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state:
        raise ValueError(f"the checkpoint's weights must have {key!r}, got {_some(state)}")
    return tuple(state[key].shape)


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """How many modules a list of modules has: 1 + the largest number after prefix."""
    numbers = (key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix))
    return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)


def _unet_config(state: dict[str, Tensor], n_groups: int) -> UnetConfig:
    levels = _count(state, "down_modules.")
    convs = [_shape(state, f"down_modules.{level}.0.blocks.0.block.0.weight") for level in range(levels)]
    down_dims = tuple(shape[0] for shape in convs)  # a weight is (C_out, C_in, kernel)
    return UnetConfig(
        down_dims=down_dims,
        kernel_size=_shape(state, "down_modules.0.0.blocks.0.block.0.weight")[2],
        n_groups=n_groups,
        diffusion_step_embed_dim=_shape(state, "diffusion_step_encoder.1.weight")[1],
        cond_predict_scale=_shape(state, "down_modules.0.0.cond_encoder.1.weight")[0] == 2 * down_dims[0],
    )


def _transformer_config(state: dict[str, Tensor], model: dict[str, Any]) -> TransformerConfig:
    return TransformerConfig(
        width=_shape(state, "pos_emb")[2],
        depth=_count(state, "decoder.layers."),
        num_heads=int(_setting(model, "n_head")),
        num_cond_layers=_count(state, "encoder.layers."),
        dropout=float(_setting(model, "p_drop_attn")),
        embedding_dropout=float(_setting(model, "p_drop_emb")),
        causal="mask" in state,
    )


def _normalizer(state: dict[str, Tensor]) -> dict[str, LinearMap]:
    """`<key>.scale`, `<key>.offset`, `<key>.input_stats.<name>` -> one LinearMap per key."""
    maps = {}
    for key in sorted({name.partition(".")[0] for name in state}):
        fields = _take_prefix(state, f"{key}.")
        stats = _take_prefix(fields, "input_stats.")
        if set(fields) != {"scale", "offset"}:
            raise ValueError(f"the normaliser of {key} must have scale and offset, got {_some(fields)}")
        maps[key] = LinearMap(fields["scale"], fields["offset"], stats)
    return maps


def _observations(meta: dict[str, Any]) -> tuple[dict[str, tuple[int, int, int]], dict[str, tuple[int, ...]]]:
    """The cameras' (H, W, 3) and the states' shapes from shape_meta.obs, which has (3, H, W)."""
    cameras, states = {}, {}
    for key, entry in meta.items():
        shape = tuple(int(n) for n in _setting(entry, "shape"))
        if _setting(entry, "type", default="low_dim") == "rgb":
            if states:
                raise ValueError(f"shape_meta.obs must list cameras before states, got {list(meta)}")
            cameras[key] = (*shape[1:], shape[0])
        else:
            states[key] = shape
    return cameras, states


def _resnet(cfg: dict[str, Any], nets: dict[str, Tensor], cameras: list[str]) -> tuple[ResnetConfig, dict[str, Tensor]]:
    """robomimic's image encoder as ours, without what it keeps twice (backbone, pool) and its softmax's constants."""
    _require(cfg, "obs_encoder_group_norm", True)
    rename: list[tuple[str, Callable[[int], str]]] = [
        ("nets.0.nets.", lambda i: f"towers.{i}.backbone."),
        ("nets.1.nets.", lambda i: f"towers.{i}.pool.conv."),
        ("nets.3.", lambda i: f"towers.{i}.linear."),
    ]
    state = {}
    for i, camera in enumerate(cameras):
        tower = _take_prefix(nets, f"{camera}.")
        for theirs, ours in rename:
            state |= {ours(i) + key: tensor for key, tensor in _take_prefix(tower, theirs).items()}
        if not bool((tower.get("nets.1.temperature", torch.ones(1)) == 1).all()):
            raise ValueError(f"the spatial softmax of {camera} must have temperature 1, got another")
        left = [key for key in tower if not key.startswith(("backbone.", "pool.", "nets.1."))]
        nets |= {f"{camera}.{key}": tower[key] for key in left}
    if nets:
        raise ValueError(f"{len(nets)} keys of the image encoder have no place in ours: {_some(nets)}")
    crop = _setting(cfg, "policy", "crop_shape", default=None)
    config = ResnetConfig(
        crop_size=None if crop is None else tuple(int(n) for n in crop),
        crop_ratio=None,
        feature_dim=_shape(state, "towers.0.linear.weight")[0],
        num_keypoints=_shape(state, "towers.0.pool.conv.weight")[0],
    )
    return config, state
