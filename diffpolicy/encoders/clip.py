"""Cameras and the instruction through the towers of a CLIP model, frozen or learning with the policy."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpolicy.encoders.clip_config import RESAMPLED, ClipConfig, chosen_layers, crop_size, square_side
from diffpolicy.encoders.parts import GOAL_PART, STATE_PART, Features, Part, PartsToCondition, part_of
from diffpolicy.encoders.resampler import AttentionPool, Keypoints, PerceiverResampler
from diffpolicy.encoders.resnet import crop_frames
from diffpolicy.encoders.state import concatenate_states, take_observation
from diffpolicy.spec import EMBEDDING, GOAL_IMAGE, IMAGES, TASK, Condition, DataSpec, Observation, unknown_name

PRETRAINED_LR_SCALE = 0.1
"""Of the policy's learning rate, for towers that begin with weights."""


class ClipEncoder(nn.Module):
    """States, cameras, a goal image and the instruction as one vector and as tokens; parts.py says in which order.

    Towers as in Radford et al. 2021, arXiv:2103.00020, built by open_clip; embeddings are not brought to length 1.

        uint8 (B, T_obs, H, W, 3) - crop - resize -> image tower -+- pooled (B, T_obs, E) per camera
                                                                  +- patches (B, T_obs, P, W) per camera, on demand
        task, B strings -> text tower - words (B, E)

    All cameras and the goal image share the image tower, unless share_towers is false. The random crop of training is the same
    over a sample's frames.
    What a training dropout hides (`droppable`) may be missing later: a role that an observation lacks, a task of "".
    """

    def __init__(self, config: ClipConfig, *, spec: DataSpec, obs_horizon: int):
        super().__init__()
        from diffpolicy.encoders import clip_towers  # open_clip takes seconds that other policies need not pay

        self.picture_keys = (*spec.image_keys, *spec.goal_keys)
        if not spec.state_keys and not self.picture_keys:
            raise ValueError(f"encoder.name=clip needs a camera or a state, the data has only {sorted(spec.fields)}")
        if not self.picture_keys and config.text == "none":
            raise ValueError(
                f"encoder.name=clip has nothing to do with encoder.text=none and no camera among {sorted(spec.fields)}; "
                "use encoder.name=state"
            )
        if not self.picture_keys and config.wants_patches:
            raise ValueError(f"encoder.image={config.image} needs a camera, the data has only {sorted(spec.fields)}")
        self.config, self.spec, self.obs_horizon = config, spec, obs_horizon
        self._embed_image, self._embed_text = clip_towers.embed_image, clip_towers.embed_text
        self._without_padding, self._reading = clip_towers.without_padding, clip_towers.reading
        towers = clip_towers.build_towers(
            config.model,
            config.pretrained,
            need_image=bool(self.picture_keys),
            need_text=config.text != "none",
            image_size=config.image_size,
            architecture=config.architecture,
        )
        self.image_tower, self.text_tower, self.architecture = towers.image, towers.text, towers.architecture
        is_new = config.architecture is None  # a loaded policy has said it when it was trained
        self._tunings = {"image": config.tuning, "text": config.text_tuning or config.tuning}
        self.image_towers = nn.ModuleDict()
        if not config.share_towers and self._tunings["image"] != "frozen" and len(self.picture_keys) > 1:
            self.image_towers.update({tower_name(key): copy.deepcopy(towers.image) for key in self.picture_keys})
            self.image_tower = None
        elif not config.share_towers and is_new:
            why = (
                "a frozen tower stays the same for all"
                if len(self.picture_keys) > 1
                else "there is one picture at most"
            )
            warnings.warn(f"encoder.share_towers=false is ignored: {why}", stacklevel=2)
        self._frozen = self._prepare_towers()
        if is_new:
            for name, why in config.ignored().items():
                warnings.warn(f"encoder.{name}={getattr(config, name)} is ignored with {why}", stacklevel=2)
            keeping = [*self._frozen, *(name for name in self.towers() if "lora" in self._tuning(name))]
            if keeping and not config.begins_with_weights:
                warnings.warn(
                    f"encoder.model={config.model!r} keeps random weights in {keeping[0]}; set encoder.pretrained, "
                    "or encoder.tuning=full to learn them",
                    stacklevel=2,
                )

        embed_dim = self.architecture["model"]["embed_dim"]
        vector_dim, num_image_tokens, image_dim = embed_dim, 1, embed_dim
        self.resampler = self.keypoints = None
        if towers.image is not None:
            self.image_size = square_side(towers.image.image_size, config.model)
            self.crop_sizes = {key: crop_size(config, key, spec.fields[key].shape) for key in self.picture_keys}
            if config.wants_patches:
                num_image_tokens, image_dim = clip_towers.patch_grid(towers.image, config.model, wanted=config.image)
                self.num_layers = clip_towers.num_layers(towers.image)
                self.image_layers = chosen_layers(config, self.num_layers)
                image_dim *= len(self.image_layers)
                self.patch_shape = (num_image_tokens, image_dim)
            if config.image == "keypoints":
                sizes = {"num_patches": num_image_tokens, "num_keypoints": config.num_keypoints}
                self.keypoints = Keypoints(image_dim, **sizes)
                vector_dim += 2 * config.num_keypoints
                num_image_tokens, image_dim = 1, vector_dim
            if config.image in RESAMPLED:
                sizes = {"num_tokens": config.num_image_tokens, "dim": config.token_dim}
                if config.image == "attention_pool":
                    self.resampler = AttentionPool(image_dim, **sizes)
                else:
                    self.resampler = PerceiverResampler(image_dim, depth=config.resampler_depth, **sizes)
                num_image_tokens, image_dim = config.num_image_tokens, config.token_dim
        if self.text_tower is not None:
            text = self.architecture["model"]["text_cfg"]
            choices = text.get("tokenizer_kwargs") or {}
            length = self.text_tower.context_length
            self.tokenizer = clip_towers.Tokenizer(length, too_long=config.text_too_long, **choices)
            self._embedded: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
            self._embedded_by: tuple = ()

        parts = []
        if spec.state_keys:
            parts.append(
                Part(
                    STATE_PART,
                    "state",
                    obs_horizon,
                    spec.state_dim,
                    1,
                    spec.state_dim,
                    config.state_dropout,
                    framed=True,
                )
            )
        picture = (vector_dim, num_image_tokens, image_dim)
        parts += [
            Part(key, "image", obs_horizon, *picture, config.camera_dropout, framed=True) for key in spec.image_keys
        ]
        parts += [Part(GOAL_PART, "goal", 1, *picture, config.goal_dropout, framed=False) for _ in spec.goal_keys]
        if self.text_tower is not None:
            num_words, word_dim = 1, embed_dim
            if config.text == "tokens":
                num_words, word_dim = self.text_tower.context_length, text["width"]
            parts.append(Part(TASK, "text", 1, embed_dim, num_words, word_dim, config.task_dropout, framed=False))
        names = {part.name for part in parts}
        for name, section in ((TASK, "task"), (GOAL_PART, "goal"), (STATE_PART, "state")):
            if getattr(config, f"{section}_dropout") > 0 and name not in names:
                warnings.warn(f"encoder.{section}_dropout is ignored: this policy has no {name}", stacklevel=2)
        if config.camera_dropout > 0 and not spec.image_keys:
            warnings.warn("encoder.camera_dropout is ignored: this policy has no camera", stacklevel=2)
        self.assemble = PartsToCondition(parts, token_dim=config.token_dim)
        self.cond = self.assemble.cond

    def towers(self) -> dict[str, nn.Module]:
        """Name of the attribute -> tower, for all that there are."""
        towers = {"image_tower": self.image_tower, "text_tower": self.text_tower}
        towers |= {f"image_towers.{name}": tower for name, tower in self.image_towers.items()}
        return {name: tower for name, tower in towers.items() if tower is not None}

    def _tuning(self, tower: str) -> str:
        return self._tunings[tower.partition("_")[0]]

    def _prepare_towers(self) -> list[str]:
        """Freezes, adapts and checkpoints the towers as configured; the names of what must stay in eval mode."""
        from diffpolicy.encoders import clip_towers, lora

        config, frozen = self.config, []
        for name, tower in self.towers().items():
            if self._tuning(name) == "lora":
                lora.add_adapters(
                    tower,
                    rank=config.lora_rank,
                    alpha=config.lora_alpha,
                    dropout=config.lora_dropout,
                    targets=config.lora_targets,
                )
            else:
                parts = clip_towers.freeze(tower, self._tuning(name), config.num_tuned_blocks)
                frozen += [f"{name}.{part}".rstrip(".") for part in parts]
            if config.gradient_checkpointing and self._tuning(name) != "frozen":
                clip_towers.checkpoint_gradients(tower)
        return frozen

    @property
    def droppable(self) -> frozenset[str]:
        """Parts that may be missing, as training hid them now and then: `state`, camera roles, `goal`, `task`."""
        return self.assemble.droppable

    def train(self, mode: bool = True) -> ClipEncoder:
        """Frozen parts stay in eval mode: no dropout, no moving statistics."""
        super().train(mode)
        for name in self._frozen:
            self.get_submodule(name).eval()
        return self

    def lr_scales(self) -> dict[str, float]:
        """Names of the towers' parameters that learn -> their learning rate over the policy's."""
        scales = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and name.startswith(tuple(f"{tower}." for tower in self.towers())):
                began = self.config.begins_with_weights and ".lora_" not in name
                scales[name] = self.config.lr_scale or (PRETRAINED_LR_SCALE if began else 1.0)
        return scales

    def forward(self, obs: Observation, *, drop: Collection[str] = (), without: Collection[str] = ()) -> Condition:
        """Condition of observations role -> (B, T_obs, ...): states normalised, images uint8; task -> B strings.

        Args:
            drop: parts that are treated as missing although they are here.
            without: parts for which the condition also comes without them (Condition.without), from the same features.
        Raises:
            ValueError: a part is missing that the policy never learned to do without, or has another shape or type.
        """
        names = [part.name for part in self.assemble.parts]
        for name in {*drop, *without} - set(names):
            raise unknown_name("a part of this policy's observation", name, names)
        batch_size = len(next(iter(obs.values())))
        like = next(self.assemble.parameters())
        features: dict[str, Features | None] = dict.fromkeys(names)
        if STATE_PART in features and STATE_PART not in drop and any(key in obs for key in self.spec.state_keys):
            states = concatenate_states(obs, self.spec, self.obs_horizon)  # (B, T_obs, D_state)
            features[STATE_PART] = Features(states, states.unsqueeze(2))
        here = [key for key in self.picture_keys if {key, f"{EMBEDDING}{key}.pooled"} & obs.keys()]
        here = [key for key in here if part_of(key) not in drop]
        if here:
            for key, found in self.embed_images(obs, here).items():
                features[part_of(key)] = found
        if self.text_tower is not None and TASK not in drop:
            features[TASK] = self.embed_tasks(obs, batch_size=batch_size, like=like)
        return self.assemble(features, batch_size=batch_size, like=like, without=without)

    def embed_images(self, obs: Observation, keys: Sequence[str]) -> dict[str, Features]:
        """Cameras and goal image, each as its tower sees it, or as the frozen tower saw it once (`diffpolicy data embed`)."""
        seen = {key: self.embedded(obs, key) for key in keys if f"{EMBEDDING}{key}.pooled" in obs}
        pixels = {
            key: self.pixels(obs, key) for key in keys if key not in seen
        }  # (B*T_obs, 3, S, S), goal (B, 3, S, S)
        if self.image_tower is None:
            seen |= {key: self.look(self.image_towers[tower_name(key)], p) for key, p in pixels.items()}
        elif pixels:  # all in one pass
            sizes = [len(p) for p in pixels.values()]
            pooled, patches = self.look(self.image_tower, torch.cat(list(pixels.values())))
            parts = [None] * len(sizes) if patches is None else patches.split(sizes)
            seen |= zip(pixels, zip(pooled.split(sizes), parts, strict=True), strict=True)
        return {key: self.image_features(key, *seen[key]) for key in keys}

    def embedded(self, obs: Observation, key: str) -> tuple[Tensor, Tensor | None]:
        """What `look` once found in these pictures, as the tower's numbers: pooled (N, E), patches (N, P, W).

        Raises:
            ValueError: the patches that are looked at, or all their layers, are missing.
        """
        dtype, frames = next(self.assemble.parameters()).dtype, self.num_frames(key)
        pooled = take_observation(obs, f"{EMBEDDING}{key}.pooled", (frames, self.architecture["model"]["embed_dim"]))
        patches = None
        if self.config.wants_patches:
            patches = take_observation(obs, f"{EMBEDDING}{key}.patches", (frames, *self.patch_shape))
            patches = patches.flatten(0, 1).to(dtype)
        return pooled.flatten(0, 1).to(dtype), patches

    def look(self, tower: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a tower says of pictures (N, 3, S, S): pooled (N, E), and patches (N, P, W) of the layers that are looked at."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tunings["image"] != "frozen"):
            if not self.config.wants_patches:
                return self._embed_image(tower, pixels, patches=False)
            return self._embed_image(tower, pixels, patches=True, layers=self.image_layers)

    def image_features(self, key: str, pooled: Tensor, patches: Tensor | None) -> Features:
        """What `look` found in B * num_frames pictures of a role, as keypoints or resampled where configured."""
        if self.keypoints is not None:
            pooled = torch.cat([pooled, self.keypoints(patches).flatten(1)], dim=-1)  # (N, E + 2 K)
        if patches is None or self.keypoints is not None:
            tokens = pooled.unsqueeze(1)
        else:
            tokens = patches if self.resampler is None else self.resampler(patches)
        frames = self.num_frames(key)
        return Features(pooled.unflatten(0, (-1, frames)), tokens.unflatten(0, (-1, frames)))

    def num_frames(self, key: str) -> int:
        """T_obs of a camera, 1 of the goal image."""
        return 1 if key == GOAL_IMAGE else self.obs_horizon

    def pixels(self, obs: Observation, key: str) -> Tensor:
        """What the tower sees of one camera, (B*T_obs, 3, S, S) floats; a random crop in training, else the centre.

        Resized with antialiasing where the crop has another size, by the interpolation and normalised by the constants
        that the weights were trained with.

        Raises:
            ValueError: the camera is missing, of another size, or not uint8.
        """
        frames = take_observation(obs, key, (self.num_frames(key), *self.spec.fields[key].shape))
        if frames.dtype != torch.uint8:
            raise ValueError(f"{key} must be uint8 in 0..255 (it is scaled here), got {frames.dtype}")
        if self.crop_sizes[key] != tuple(frames.shape[2:4]):
            frames = crop_frames(frames, self.crop_sizes[key], random=self.training)  # uint8: a quarter of the traffic
        x = frames.flatten(0, 1).permute(0, 3, 1, 2).float()  # (B*T_obs, 3, h, w), 0..255
        preprocess = self.architecture["preprocess"]
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=self.image_size, mode=preprocess["interpolation"], antialias=True)
            x = x.clamp(0, 255).round()  # bicubic overshoots; what the tower was trained on was rounded
        mean, std = (x.new_tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
        tower = self.image_tower or self.image_towers[tower_name(key)]
        return ((x / 255 - mean) / std).to(next(tower.parameters()).dtype)

    def embed_tasks(self, obs: Observation, *, batch_size: int, like: Tensor) -> Features | None:
        """The instructions, None where nothing is said; each distinct one is embedded once.

        Where the text tower learns, that is once in a batch, with gradients; else once for as long as its weights last.

        Raises:
            ValueError: an instruction is no text, too long, or missing although the policy never learned to do without.
        """
        tasks = check_tasks(obs.get(TASK), batch_size, may_be_empty=TASK in self.droppable)
        said = [task for task in tasks if task]
        if not said:
            return None
        distinct = {task: i for i, task in enumerate(dict.fromkeys(said))}
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.text_tower.parameters())
        if learns or (self.training and self._tunings["text"] != "frozen"):
            embedded = self.read(distinct, like.device)
        else:
            each = [self.remembered(task, like.device) for task in distinct]
            embedded = [torch.cat(of_all) for of_all in zip(*each, strict=True)]
        row = torch.tensor([distinct.get(task, 0) for task in tasks], device=like.device)
        vector, words, mask = (x[row] for x in embedded)
        present = None
        if len(said) < batch_size:
            present = torch.tensor([bool(task) for task in tasks], device=like.device)
        padding = mask if self.config.text == "tokens" else None
        return Features(vector.unsqueeze(1), words.unsqueeze(1), token_mask=padding, present=present)

    def read(self, tasks: Collection[str], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Instructions -> pooled (n, E), tokens (n, C, W) with their mask (n, C); pooled as the one token (n, 1, E) unless
        text=tokens."""
        ids = torch.stack([self.tokenizer(self.config.prompt.replace("{}", task)) for task in tasks])
        ids = self._without_padding(
            self.text_tower, ids
        )  # (n, L), on the CPU still: its length is known without waiting
        with self._reading(self.text_tower, ids.shape[1]):
            if self.config.text == "tokens":
                pooled, words, mask = self._embed_text(self.text_tower, ids.to(device))
                rest = self.text_tower.context_length - ids.shape[1]
                return pooled, F.pad(words, (0, 0, 0, rest)), F.pad(mask, (0, rest))
            pooled = self.text_tower(ids.to(device))
        return pooled, pooled.unsqueeze(1), torch.ones(len(pooled), 1, dtype=torch.bool, device=device)

    def remembered(self, task: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """One instruction as `read` gives it, embedded alone, so that its neighbours in a batch do not count."""
        bits = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        weights = (bits, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.text_tower.parameters()))
        if weights != self._embedded_by:
            self._embedded, self._embedded_by = {}, weights
        if task not in self._embedded:
            with torch.inference_mode(False), torch.no_grad():  # a later training step may use it
                self._embedded[task] = tuple(x.clone() for x in self.read([task], device))
        return self._embedded[task]


def check_tasks(tasks: object, batch_size: int, *, may_be_empty: bool = False) -> list[str]:
    """The instructions, one for each observation, "" for none.

    Raises:
        ValueError: one is no text, or there is none although there must be.
    """
    fix = (
        "record demonstrations with an instruction, or set encoder.text=none; a policy trained with encoder.task_dropout "
        "can do without"
    )
    if tasks is None:
        if may_be_empty:
            return [""] * batch_size
        raise ValueError(f"observation must have {TASK!r}, the instruction that encoder.text=pooled reads; {fix}")
    if isinstance(tasks, str) or len(tasks) != batch_size:
        raise ValueError(f"{TASK} must be a list of B={batch_size} strings, got {tasks!r}")
    for i, task in enumerate(tasks):
        if may_be_empty and task is None:
            continue
        if not isinstance(task, str) or not (task.strip() or may_be_empty):
            raise ValueError(f"{TASK} must hold an instruction for every observation, number {i} has {task!r}; {fix}")
    return [task if task and task.strip() else "" for task in tasks]


def tower_name(key: str) -> str:
    """What the tower of a camera, or of the goal image, is called where each has its own: state-dict names hold no dots."""
    return "goal/image" if key == GOAL_IMAGE else key.removeprefix(IMAGES).replace(".", "/")
