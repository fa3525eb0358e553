"""Device, precision, and an optimiser step that a NaN cannot pass."""

import contextlib
import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.splits import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name if name != "cuda" else f"cuda:{local_rank}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def available_memory(device: torch.device) -> int:
    """Bytes that a run can still take on its device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # Linux; free pages alone would leave out what the cache gives back
        with open("/proc/meminfo") as file:
            return 1024 * next(int(line.split()[1]) for line in file if "MemAvailable" in line)
    except (OSError, StopIteration):
        return 1 << 62


@contextlib.contextmanager
def _plain_attention():
    """Attention in plain matrix products, for bf16 on a CPU.

    torch's fused kernel is slow there in its backward pass: forward and backward of a ViT of width
    64, depth 4 and 64 tokens take 2.6 times as long with it (docs/speed.md). The products keep an
    N x heads x L x L tensor for each block, which the fused kernel does not.
    """
    reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # CPUs heed it too
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(reduced)


class Precision:
    """Autocast, loss scaling, and the guarded update.

    dtype "auto": bf16 where the card computes in it natively, else fp16 with a loss scaler; fp32 on
    a CPU. Master weights are always float32.

    `update` masks the optimiser on the device when a loss or a gradient is not finite; nothing is
    read by the host until `check`, which a loop calls before each print and each save.
    """

    def __init__(self, device: torch.device, dtype: str = "auto"):
        if dtype == "auto":
            dtype = "fp32"
            if device.type == "cuda":
                native = torch.cuda.get_device_capability(device)[0] >= 8
                dtype = "bf16" if native else "fp16"
        self.device, self.dtype = device, DTYPES[dtype]
        self.scaler = torch.amp.GradScaler(device.type) if dtype == "fp16" else None
        self.reset()

    def reset(self):
        """Forget earlier updates: a new stage begins."""
        self.count = self.first_bad = self.skipped = None

    def _attention(self):
        on = self.device.type == "cpu" and self.dtype == torch.bfloat16
        return _plain_attention() if on else contextlib.nullcontext()

    @contextlib.contextmanager
    def autocast(self):
        """A fresh context for each forward: two that share one share its cache of cast weights, and
        a pass under no_grad would leave weights there which cut the next pass's gradients."""
        on = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=on), self._attention():
            yield

    def backward(self, loss: Tensor):
        with self._attention():  # blocks that are computed again take the same kernels
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> Tensor:
        """Step the optimiser unless something is not finite. Returns 1. or 0. as a 0-dim tensor.

        The optimiser must skip a step by its `found_inf` attribute (torch's fused ones do). Under
        fp16 an overflow of the scaled gradients is routine: the scaler halves its scale and only
        fifty in a row are an error.
        """
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.trained = [p for p in params if p.grad is not None]
        grads = [p.grad for p in self.trained]
        norms = torch.stack(torch._foreach_norm(grads)).float()
        values = torch.stack([v.detach().float() for v in losses.values()])
        bad_loss, bad_grad = ~values.isfinite().all(), ~norms.isfinite().all()
        if dist.is_initialized():  # a loss is one process's own; all must skip together
            both = torch.stack([bad_loss, bad_grad]).float()
            dist.all_reduce(both, dist.ReduceOp.MAX)
            bad_loss, bad_grad = both[0] > 0, both[1] > 0
        if self.count is None:
            zero = torch.zeros((), dtype=torch.long, device=values.device)
            self.count, self.first_bad, self.skipped = zero, zero.clone(), zero.clone()
            self.seen = torch.zeros(len(values) + len(norms), device=values.device)
        overflow = bad_grad & ~bad_loss if self.scaler is not None else torch.zeros_like(bad_grad)
        error = (bad_loss | bad_grad) & ~overflow
        self.count = self.count + 1
        self.skipped = torch.where(overflow, self.skipped + 1, torch.zeros_like(self.skipped))
        new = error & (self.first_bad == 0)
        self.first_bad = torch.where(new, self.count, self.first_bad)
        self.seen = torch.where(new, torch.cat([values, norms]), self.seen)
        self.names = list(losses)
        found_inf = (error | overflow).float()
        optimizer.found_inf, optimizer.grad_scale = found_inf, None
        optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        return 1.0 - found_inf

    def check(self, optimizer: torch.optim.Optimizer, names: dict[Tensor, str], done: int):
        """Read the flags (one sync); raises UserError naming the step and the tensors of the first.

        names: parameter -> name. done: updates made in this stage up to now.
        """
        if self.count is None:
            return
        first, skipped, count = torch.stack([self.first_bad, self.skipped, self.count]).tolist()
        if first:
            seen = self.names + ["gradient of " + names.get(p, "?") for p in self.trained]
            bad = [n for n, v in zip(seen, self.seen.tolist()) if not math.isfinite(v)]
            more = f" and {len(bad) - 6} more" if len(bad) > 6 else ""
            raise UserError(
                f"step {done - count + first}: not finite: {', '.join(bad[:6])}{more}; the update "
                "was skipped and no checkpoint holds it. --resume with --dtype fp32, or start anew "
                "with a smaller --lr"
            )
        if skipped >= 50:
            raise UserError(
                f"step {done}: fp16 gradients overflowed {skipped} times in a row; --resume with "
                "--dtype bf16 or fp32"
            )
