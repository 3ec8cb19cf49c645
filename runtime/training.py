"""One training step: weights, their average, the optimizer, and a watch for steps that are not finite.

Built from explicit values: train.py trains with it, and benchmark.py measures the same lines.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.objectives import OBJECTIVES
from models import DiT
from runtime import distributed
from runtime.config import DEFAULT_OBJECTIVE, ModelConfig, Recipe


def initial_model(config: ModelConfig, seed: int) -> DiT:
    """The model with the weights that a seed gives it."""
    torch.manual_seed(distributed.hash_seed(seed, "weights"))
    return config.build()


def learning_rate(step: int, total_steps: int, recipe: Recipe) -> float:
    """Learning rate of the update that completes step (1 to total_steps)."""
    if step <= recipe.warmup_steps:
        return recipe.lr * step / recipe.warmup_steps
    if recipe.lr_schedule == "linear":
        return recipe.lr * (total_steps - step) / (total_steps - recipe.warmup_steps)
    return recipe.lr


class NonFiniteWatch:
    """Counts steps in a row whose loss or gradient was not finite, without waiting for the device.

    On a GPU the count is copied in the background and seen a step or two later.
    """

    def __init__(self, device: torch.device, streak: int = 0):
        self.streak = torch.tensor(streak, device=device)
        self.seen = streak
        self._copy, self._copied = None, None

    def update(self, finite: Tensor) -> None:
        self.streak = torch.where(finite, 0, self.streak + 1)
        if self.streak.device.type != "cuda":
            self.seen = int(self.streak)
        elif self._copied is None or self._copied.query():
            self.seen = self.seen if self._copy is None else int(self._copy)
            self._copy = self.streak.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()


class Trainer:
    """Weights, their average and the optimizer, and the step that changes them.

    latents turns a batch of inputs into scaled latents (n, C, h, w): see vae.latents_from. precision is "fp32" or
    "bf16". total_steps is the length of the run, which the learning rate follows.
    """

    def __init__(
        self,
        model: DiT,
        recipe: Recipe,
        total_steps: int,
        latents: Callable[[Tensor], Tensor],
        device: torch.device,
        precision: str = "fp32",
        objective: str = DEFAULT_OBJECTIVE,
        compile_model: bool = False,
    ):
        self.model = model.to(device)
        self.recipe, self.total_steps, self.latents = recipe, total_steps, latents
        self.device, self.precision, self.objective = device, precision, OBJECTIVES[objective]
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.parameters = list(self.model.parameters())
        self.ema_parameters = list(self.ema.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
        self.step = 0
        self.sums = torch.zeros(4, device=device)  # since the last log line: loss, gradient norm, steps, skipped
        self.watch = NonFiniteWatch(device)
        self.loss = torch.zeros((), device=device)
        if device.type == "cpu" and precision == "bf16":
            self.model.write_out_attention()
        self.skipped: set[str] = set()  # unreadable images that others stood in for, in batches of this process
        self.told: set[str] = set()  # those of all processes that newly_skipped has given
        if compile_model:
            self.model.compile_blocks()
        self.model.train()
        self.distributed_model = distributed.wrap(self.model, device)

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with distributed.autocast(self.device, self.precision):
            return self.distributed_model(x, t, y)

    def micro_batch_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a micro-batch: inputs as latents takes them, labels (n,)."""
        inputs, y = (tensor.to(self.device, non_blocking=True) for tensor in (inputs, labels))
        return self.objective.loss(self.predict, self.latents(inputs), y).mean()

    def train_step(self, batches: list[tuple]) -> None:
        """One update from this process's micro-batches, which data.collate makes.

        A non-finite loss or gradient skips it on every process.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step + 1, self.total_steps, self.recipe)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for k, (inputs, labels, *skipped) in enumerate(batches):
            self.skipped.update(*skipped)
            distributed.seed_step(self.recipe.global_seed, self.step, k)
            with distributed.no_sync(self.distributed_model, last=k == len(batches) - 1):
                loss = self.micro_batch_loss(inputs, labels) / len(batches)
                # Times 1, or NaN when the loss is not finite: the averaged gradient then tells every process.
                (loss * (1 + 0 * loss.detach())).backward()
            losses.append(loss.detach())
        self.loss = torch.stack(losses).sum()
        self.update()
        self.step += 1

    @torch.no_grad()
    def update(self) -> None:
        """Optimizer step, skipped unless the gradients are finite, then a step of the average to the weights."""
        gradients = [parameter.grad for parameter in self.parameters]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(norm)
        if self.recipe.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.grad_clip, norm)
        self.optimizer.found_inf = (~finite).float()  # the fused optimizer then leaves everything as it is
        self.optimizer.step()
        torch._foreach_lerp_(self.ema_parameters, self.parameters, 1 - self.recipe.ema_decay)
        one, zero = torch.ones_like(norm), torch.zeros_like(norm)
        values = torch.stack([self.loss, norm, one, zero])
        self.sums += torch.where(finite, values, torch.stack([zero, zero, zero, one]))
        self.watch.update(finite)

    def log_record(self) -> dict:
        """Means since the last log line over steps and processes; loss and norm are None if every step was skipped."""
        loss, norm, steps, skipped = self.sums.tolist()
        loss = float(distributed.all_reduce(torch.tensor(loss, dtype=torch.float64))) / distributed.world_size()
        self.sums.zero_()
        return {
            "loss": loss / steps if steps else None,
            "grad_norm": norm / steps if steps else None,
            "lr": learning_rate(self.step, self.total_steps, self.recipe),
            "skipped": int(skipped),
        }

    def all_skipped(self) -> list[str]:
        """The images that others stood in for, on any process. Called on every process."""
        return sorted(set().union(self.told, *distributed.gather(self.skipped)))

    def newly_skipped(self) -> list[str]:
        """Those of them that it has not given before. Called on every process."""
        new = [path for path in self.all_skipped() if path not in self.told]
        self.told.update(new)
        return new

    def state(self) -> dict:
        """What a checkpoint holds of it. Called on every process."""
        skipped = self.all_skipped()
        log = {"sums": distributed.gather(self.sums.tolist()), "streak": int(self.watch.streak)}
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": self.optimizer.state_dict(),
            "step": self.step,
            "log": log | ({"skipped": skipped} if skipped else {}),
        }

    def load(self, state: dict) -> None:
        """Go on from what state gave, on as many processes or others."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        moments, groups = copy.deepcopy(state["opt"]["state"]), self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})  # settings are the command's
        self.step, sums = int(state["step"]), state["log"]["sums"]
        if len(sums) != distributed.world_size():  # sum them up where the number of processes changed
            loss = sum(row[0] for row in sums) * distributed.world_size() / len(sums)
            sums = [[loss if rank == 0 else 0.0, *sums[0][1:]] for rank in range(distributed.world_size())]
        self.sums = torch.tensor(sums[distributed.rank()], dtype=torch.float32, device=self.device).view(4)
        self.watch = NonFiniteWatch(self.device, int(state["log"]["streak"]))
        self.told = {str(path) for path in state["log"].get("skipped", [])}
