"""One training run: config + data -> runs/<task>/<name>/, with progress, checkpoints and exact resume."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import logging
import math
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from omegaconf import OmegaConf
from rich.console import Console

from diffpolicy import __version__
from diffpolicy.checkpoint import (
    TRAINING_STATE,
    list_checkpoints,
    load_config_of,
    load_policy,
    read_description,
    resolve_device,
    save_policy,
)
from diffpolicy.config import Config, build_policy
from diffpolicy.embed import embedded_windows, require_same_tower
from diffpolicy.policies import DiffusionPolicy
from diffpolicy.progress import progress_bar
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import ACTION, TASK, DataSpec, MissingExtraError
from diffpolicy.training import PolicyModule, ReplayDataModule
from diffpolicy.windows import load_windows, split_episodes

METRICS = ("step", "train/loss", "train/lr", "train/steps_per_s", "val/loss", "val/action_mse")
"""Columns of metrics.csv, in order."""
RUN_OF_RANK_0 = "DIFFPOLICY_RUN"
"""Environment variable that tells the other processes of a distributed run which folder theirs is."""


def train(
    config: Config,
    *,
    runs: str | Path = "runs",
    name: str | None = None,
    resume: str | Path | None = None,
    stop_at: int | None = None,
    device: str = "auto",
    num_devices: int = 1,
    precision: str = "auto",
    keep_checkpoints: int = 3,
    wandb_project: str | None = None,
    progress: bool = True,
    console: Console | None = None,
) -> Path:
    """Trains the policy that config describes and returns the run folder.

    Args:
        resume: run folder to go on with; its data, seed and schedule must be those of config.
        stop_at: stops (with a checkpoint) at this step although the schedule ends at train.steps.
        precision: 32, bf16 or fp16; auto is bf16 on a GPU and 32 on a CPU.
        num_devices: more than one trains with DistributedDataParallel.
    Raises:
        ValueError: data and config do not fit; FloatingPointError: a loss that is not finite, naming the batch.
    """
    rank = launched_rank()
    console = Console(quiet=True) if rank > 0 else console or Console()
    device = resolve_device(device)
    if num_devices < 1 or (device == "cuda" and num_devices > torch.cuda.device_count()):
        has = f"this machine has {torch.cuda.device_count()}" if device == "cuda" else "at least 1 is needed"
        raise ValueError(f"--num-devices {num_devices}: {has}")
    if wandb_project is not None:
        _require_wandb()
    for key, seed in (("seed", config.seed), ("data.split_seed", config.data.split_seed)):
        if seed < 0:
            raise ValueError(f"{key} must not be negative, got {seed}")
    stop_at = config.train.steps if stop_at is None else stop_at
    if not 1 <= stop_at <= config.train.steps:
        raise ValueError(f"--stop-at must be in [1, train.steps = {config.train.steps}], got {stop_at}")
    if not config.data.path:
        raise ValueError("no dataset: give --data PATH.zarr (or data.path in a YAML file)")
    if not Path(config.data.path).exists():
        raise FileNotFoundError(f"{config.data.path} does not exist; say where the zarr store is with --data PATH.zarr")
    buffer = ReplayBuffer.open(config.data.path)
    training, validation = split_episodes(
        buffer.num_episodes,
        val_ratio=config.data.val_ratio,
        max_train=config.data.max_train_episodes,
        seed=config.data.split_seed,
    )
    embedded = embedded_windows(config, buffer) if config.data.embedded else None
    (train_windows, val_windows), spec = load_windows(
        buffer, config.data.keys, config.horizons, [training, validation], embedded=embedded
    )
    for windows, episodes in ((train_windows, training), (val_windows, validation)):
        if len(episodes):
            _require_finite(windows.arrays, buffer, _rows_of(buffer, episodes))
    torch.manual_seed(config.seed)
    policy = build_policy(config, spec)
    if embedded is not None and resume is None:
        require_same_tower(policy.encoder, buffer.path)
    _require_instructions(policy, buffer, [*training, *validation], console)
    rows = torch.from_numpy(_rows_of(buffer, training))
    for key in (*spec.state_keys, ACTION):
        policy.normalizer.fit(key, train_windows.arrays[key][rows])
    policy.process.fit(policy.normalizer.normalize(ACTION, train_windows.arrays[ACTION][rows]))
    _warn_of_clipped_actions(policy, train_windows.arrays[ACTION][rows], console)
    module = PolicyModule(policy, config=config.train, seed=config.seed)
    data = ReplayDataModule(train_windows, val_windows, config=config.train, seed=config.seed)

    if resume is not None:
        run = Path(resume)
        state = _resumable_state(run)
        if (done := read_description(state.parent)["step"]) >= stop_at:
            console.print(f"nothing to do: {run} is at step {done} already, and was to stop at {stop_at}")
            return run
        _require_same_shapes(state, spec, config.data.path)
        if embedded is not None:  # the policy gets its weights, the tower's too, when training starts
            require_same_tower(load_policy(state.parent).encoder, buffer.path)
    elif rank > 0:
        run, state = _run_of_rank_0(Path(runs), config, name), None
    else:
        run, state = _new_run(Path(runs), config, name), None
        os.environ[RUN_OF_RANK_0] = str(run)
        _describe_run(run, config)
    batch_size = min(config.train.batch_size, len(train_windows))
    if batch_size < config.train.batch_size:
        console.print(
            f"train.batch_size={config.train.batch_size} is lowered to {batch_size}: there are no more windows"
        )
    num_parameters = sum(p.numel() for p in policy.parameters())
    console.print(
        f"[bold]{config.task}[/bold]: {len(training)} training and {len(validation)} validation episodes, "
        f"{len(train_windows):,} windows; {config.denoiser.name} with {config.process.name}, "
        f"{num_parameters:,} parameters; run folder {run}"
    )
    keeper = Keeper(
        module, config, run, train_windows, keep=keep_checkpoints, stop_at=stop_at, progress=progress, console=console
    )
    loggers: list[Logger] = [TensorBoardLogger(save_dir=run, name="", version="tensorboard")]
    if wandb_project is not None:
        loggers.append(_wandb_logger(wandb_project, run))
    _quiet_lightning()
    # A denoiser that sees the global vector only leaves the projections of words and patches without gradients.
    strategy = "ddp_find_unused_parameters_true" if set(policy.encoder.cond.kinds) - {"frame"} else "ddp"
    trainer = L.Trainer(
        accelerator={"cuda": "gpu"}.get(device, device),
        devices=num_devices,
        strategy="auto" if num_devices == 1 else strategy,
        precision={
            "auto": "bf16-mixed" if device == "cuda" else "32-true",
            "32": "32-true",
            "bf16": "bf16-mixed",
            "fp16": "16-mixed",
        }[precision],
        max_steps=stop_at,
        max_epochs=-1,
        gradient_clip_val=config.train.grad_clip,
        val_check_interval=config.train.val_every,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if len(val_windows) else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=config.train.log_every,
        logger=loggers,
        callbacks=[keeper],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # BatchStream deals the windows out to the ranks
        default_root_dir=run,
    )
    with _sole_trainer_of(run) if rank == 0 else nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*(treespec|in eval mode at the start).*")
        trainer.fit(module, data, ckpt_path=str(state) if state else None, weights_only=True)
    return run


@contextmanager
def _sole_trainer_of(run: Path) -> Iterator[None]:
    """Two processes in one run folder would mix their checkpoints and metrics; the lock ends with its process."""
    import fcntl  # POSIX only

    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run} is being trained by another process; stop it, or choose another run") from None
        yield
    finally:
        os.close(folder)


def launched_rank() -> int:
    """0, or the rank of this process where another one (Lightning, torchrun) launched it for a distributed run."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))


class Keeper(L.Callback):
    """Keeps what was trained: metrics, checkpoints, a stop at the first loss that is not finite, and at Ctrl-C."""

    def __init__(
        self, module, config: Config, run: Path, windows, *, keep: int, stop_at: int, progress: bool, console: Console
    ):
        self.config, self.run, self.windows = config, run, windows
        self.keep, self.stop_at, self.console = keep, stop_at, console
        self.metrics: dict[str, float] = {}
        self._losses: dict[int, torch.Tensor] = {}
        self._asked_to_stop = False
        self._bar = progress_bar("train", console) if progress and console.is_terminal else None
        self._lines = progress and not console.is_terminal
        """Written to a file, progress is a line now and then."""

    def on_train_start(self, trainer: L.Trainer, module: PolicyModule) -> None:
        self._began, self._first_step = time.perf_counter(), trainer.global_step
        self._stream = trainer.datamodule.stream()
        if trainer.is_global_zero:
            _forget_rows_after(self.run / "metrics.csv", trainer.global_step)
        if self._bar and trainer.is_global_zero:
            self._bar.start()
            self._task = self._bar.add_task("train", total=self.stop_at, completed=trainer.global_step, shown="")
        if threading.current_thread() is threading.main_thread():  # else whoever runs us handles signals
            for number in (signal.SIGINT, signal.SIGTERM):  # Lightning gives all handlers back in the end
                signal.signal(number, self._stop_soon)

    def _stop_soon(self, number, frame) -> None:
        if self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True
        self.console.print("\nstopping after this step and saving; press Ctrl-C again to stop at once without saving")

    def on_train_batch_end(self, trainer: L.Trainer, module: PolicyModule, outputs, batch, batch_idx) -> None:
        step, config = trainer.global_step, self.config.train
        self._losses[step] = module.last_loss
        asked = self._asked_to_stop  # read once: a signal may come while this runs
        if trainer.world_size > 1:  # all processes must stop at the same step: they agree where rows are logged
            asked = step % config.log_every == 0 and trainer.strategy.reduce_boolean_decision(asked, all=False)
        last = step >= self.stop_at or asked
        if step % config.log_every == 0 or step == 1 or last or step % config.checkpoint_every == 0:
            # one synchronisation for all the losses since the last look, and before anything is saved
            losses = torch.stack(list(self._losses.values())).tolist()
            for at, loss in zip(self._losses, losses, strict=True):
                if not math.isfinite(loss):
                    self._name_bad_batch(at, loss)
            rate = (step - self._first_step) / (time.perf_counter() - self._began)
            row = {
                "train/loss": sum(losses) / len(losses),
                "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
                "train/steps_per_s": rate,
            }
            self.metrics.update({"train/loss": row["train/loss"]})
            if step % config.log_every == 0 or last:
                self._losses.clear()
                if trainer.is_global_zero:
                    self._log(trainer, step, row)
            shown = f"loss {row['train/loss']:.4f}"
            if "val/action_mse" in self.metrics:
                shown += f"  val action mse {self.metrics['val/action_mse']:.4f} (step {self.metrics['val/step']})"
            if self._bar and trainer.is_global_zero:
                self._bar.update(self._task, completed=step, shown=shown)
            elif self._lines and trainer.is_global_zero and (step % config.checkpoint_every == 0 or last):
                self.console.print(f"step {step}/{self.stop_at}  {shown}  {rate:.1f} steps/s", soft_wrap=True)
        if step % config.checkpoint_every == 0 or last:
            self._save(trainer, module)
        if asked:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, module: PolicyModule) -> None:
        row = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.metrics.update(row | {"val/step": trainer.global_step})  # a checkpoint of this step is written already
        if trainer.is_global_zero:
            _append_row(self.run / "metrics.csv", trainer.global_step, row)

    def teardown(self, trainer: L.Trainer, module: PolicyModule, stage: str) -> None:
        if self._bar:
            self._bar.stop()

    def _log(self, trainer: L.Trainer, step: int, row: dict[str, float]) -> None:
        _append_row(self.run / "metrics.csv", step, row)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)

    def _save(self, trainer: L.Trainer, module: PolicyModule) -> None:
        for name, value in module.named_parameters():  # not buffers: masks hold -inf
            if not torch.isfinite(value).all():
                raise FloatingPointError(
                    f"{name} is not finite after step {trainer.global_step}; lower train.lr or set train.grad_clip. "
                    f"{self._last_checkpoint()}"
                )
        folder = self.run / "checkpoints" / f"step_{trainer.global_step:06d}"
        if trainer.world_size > 1:
            # every rank takes part in gathering the state, rank 0 writes it
            state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            write = lambda path: torch.save(state, path / TRAINING_STATE)
        else:
            write = lambda path: trainer.save_checkpoint(path / TRAINING_STATE)
        if not trainer.is_global_zero:
            return
        save_policy(module.ema, self.config, folder, step=trainer.global_step, metrics=self.metrics, write_more=write)
        for old in list_checkpoints(self.run)[: -self.keep]:
            shutil.rmtree(old)

    def _name_bad_batch(self, step: int, loss: float) -> None:
        windows = self._stream.windows(step - 1).tolist()
        arrays = self.windows.arrays
        for window in windows:  # a window with a number that is not finite explains it
            batch = self.windows.batch(torch.tensor([window]))
            for key, value in [*batch.obs.items(), (ACTION, batch.actions)]:
                if key in arrays and arrays[key].is_floating_point() and not torch.isfinite(value).all():
                    raise FloatingPointError(
                        f"loss is {loss} at step {step}: {key} is not finite in {self.windows.describe(window)}; "
                        f"see `diffpolicy data validate {self.config.data.path}`"
                    )
        raise FloatingPointError(
            f"loss is {loss} at step {step} although its batch is finite (windows from {self.windows.describe(windows[0])} "
            f"to {self.windows.describe(windows[-1])}); lower train.lr or set train.grad_clip. "
            f"{self._last_checkpoint()}"
        )

    def _last_checkpoint(self) -> str:
        checkpoints = list_checkpoints(self.run)
        return f"The last checkpoint is {checkpoints[-1]}" if checkpoints else "No checkpoint was written yet"


def load_resume_config(run: str | Path, *, data_path: str | None = None) -> Config:
    """The Config of a run folder's latest checkpoint; data_path says where the data lies now, if it moved."""
    config = load_config_of(_resumable_state(Path(run)).parent)
    if data_path is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data_path))
    return config


def _resumable_state(run: Path) -> Path:
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        hint = f"; give the run folder, {run.parent.parent}" if run.parent.name == "checkpoints" else ""
        raise FileNotFoundError(f"{run} is not a run folder that can be resumed: it has no checkpoints/step_*{hint}")
    state = checkpoints[-1] / TRAINING_STATE
    if not state.exists():
        raise FileNotFoundError(f"{state} is missing; a run can only be resumed from it")
    return state


def _require_same_shapes(state: Path, spec: DataSpec, data_path: str) -> None:
    """Raises ValueError where the data are not those of the run, or its training state cannot be read."""
    trained = DataSpec(**read_description(state.parent)["spec"])
    shapes, wanted = ({key: field.shape for key, field in s.fields.items()} for s in (spec, trained))
    if shapes != wanted:
        raise ValueError(f"{data_path} does not fit the run: it has {shapes}, {state.parent} was trained on {wanted}")
    try:
        torch.load(state, weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{state} is damaged; remove {state.parent} to go on from the checkpoint before it ({error})"
        ) from error


def _rows_of(buffer: ReplayBuffer, episodes):
    import numpy as np

    return np.concatenate([np.arange(s.start, s.stop) for s in map(buffer.episode_slice, episodes)])


def _require_finite(arrays: dict[str, torch.Tensor], buffer: ReplayBuffer, rows) -> None:
    """Raises ValueError, naming key, episode and step, where one of these rows of the store holds NaN or inf."""
    for key, values in arrays.items():
        if not values.is_floating_point():
            continue
        bad = rows[(~torch.isfinite(values[torch.from_numpy(rows)])).flatten(1).any(dim=1).numpy()]
        if len(bad):
            episode = int((buffer.episode_ends <= bad[0]).sum())
            raise ValueError(
                f"episode {episode} of {buffer.path}: {key} is NaN or inf at step "
                f"{bad[0] - buffer.episode_slice(episode).start} (row {bad[0]}); drop it with `diffpolicy data drop "
                f"{buffer.path} --episodes {episode}`, see all with `diffpolicy data validate {buffer.path}`"
            )


def _require_instructions(policy: DiffusionPolicy, buffer: ReplayBuffer, episodes: list[int], console: Console) -> None:
    """A policy that reads needs words in every episode, unless it learns to do without; says how many have none.

    Raises:
        ValueError: an episode has no instruction, naming the first and how many more; nothing was trained.
    """
    if "text" not in policy.encoder.cond.kinds:
        return
    silent = [episode for episode in episodes if not buffer.episode_task(episode).strip()]
    if not silent:
        return
    count = f"{len(silent)} of {len(episodes)} episodes of {buffer.path} have no instruction (the first is {silent[0]})"
    if TASK not in policy.droppable:
        raise ValueError(
            f"{count}, and encoder.name=clip reads it; write them with `diffpolicy data convert OLD.zarr NEW.zarr --task "
            '"..."` (one for all) or `diffpolicy data merge` (one for each source), drop these episodes, learn to do without '
            "(encoder.task_dropout=0.1), or set encoder.text=none"
        )
    console.print(f"{count}: learnt as if nothing was said")


def _warn_of_clipped_actions(policy: DiffusionPolicy, actions: torch.Tensor, console: Console) -> None:
    limit = policy.sampler.clip_sample
    if limit is None:
        return
    size = policy.normalizer.normalize(ACTION, actions).abs()  # (N, D_act)
    beyond = (size > limit * 1.001).float().mean().item()
    if beyond:
        console.print(
            f"warning: sampler.clip_sample={limit} cuts off {beyond:.2%} of the recorded actions, which reach "
            f"{size.max().item():.3g} when normalised by normalizer.action={policy.normalizer.modes[ACTION]}; "
            "set sampler.clip_sample=null (or higher), or normalizer.action=limits",
            soft_wrap=True,
        )


def _new_run(runs: Path, config: Config, name: str | None) -> Path:
    for what, part in (("task", config.task), ("--name", name)):
        if part is not None and (part in ("", ".", "..") or Path(part).name != part):
            raise ValueError(f"{what} names one folder below {runs}; it must hold no path separators, got {part!r}")
    run = runs / config.task / (name or datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    if run.exists() and any(run.iterdir()):
        if not list_checkpoints(run):
            raise ValueError(f"{run} exists, without a checkpoint to resume from; remove it or choose another --name")
        raise ValueError(f"{run} exists; resume it with `diffpolicy train --resume {run}` or choose another --name")
    run.mkdir(parents=True, exist_ok=True)
    return run


def _run_of_rank_0(runs: Path, config: Config, name: str | None) -> Path:
    if RUN_OF_RANK_0 in os.environ:
        return Path(os.environ[RUN_OF_RANK_0])
    if name is None:
        raise ValueError("processes that were launched side by side need a common --name")
    return runs / config.task / name


def _describe_run(run: Path, config: Config) -> None:
    """config.yaml and environment.json: the run folder explains itself."""
    OmegaConf.save(OmegaConf.create(config.to_dict()), run / "config.yaml")
    environment = {
        "command": sys.argv,
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
        "diffpolicy": __version__,
        "commit": _commit(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    (run / "environment.json").write_text(json.dumps(environment, indent=2))


def _commit(package: Path) -> str | None:
    """The commit of the checkout that a package lies in; None where it is installed, or git is not."""
    if shutil.which("git") is None:
        return None
    tracked = ["git", "-C", str(package), "ls-files", "--error-unmatch", "__init__.py"]  # not just a venv inside a repo
    if subprocess.run(tracked, capture_output=True, check=False).returncode != 0:
        return None
    head = subprocess.run(["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return head.stdout.strip() or None


def _append_row(file: Path, step: int, row: dict[str, float]) -> None:
    new = not file.exists()
    with open(file, "a", newline="") as handle:
        writer = csv.DictWriter(handle, METRICS)
        if new:
            writer.writeheader()
        writer.writerow({"step": step} | {k: f"{v:.6g}" for k, v in row.items()})


def _forget_rows_after(file: Path, step: int) -> None:
    """Rows that an interrupted run wrote after its last checkpoint will be written again."""
    if not file.exists():
        return
    with open(file, newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if int(row["step"]) <= step]
    partial = file.with_suffix(".partial")
    with open(partial, "w", newline="") as handle:
        writer = csv.DictWriter(handle, METRICS)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(file)


def _require_wandb() -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise MissingExtraError("wandb", "wandb") from None


def _wandb_logger(project: str, run: Path) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(project=project, save_dir=run, name="/".join(run.parts[-2:]))


def _quiet_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
