"Sample images from an unconditional EDM diffusion model."
import hashlib, json, torch
from contextlib import contextmanager
from torch import nn
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

class ProjectError(Exception):
    "An error that the user can fix: the message says what went wrong and what to do."


def digest(
    obj, # bytes, or anything that can be written as JSON
    length: int=12, # number of hexadecimal digits to keep
) -> str:
    "Return a short SHA-256 of `obj`. Raises `TypeError`, or `ValueError` for NaN and infinity, if not JSON."
    if not isinstance(obj, bytes): obj = json.dumps(obj, sort_keys=True, allow_nan=False).encode()
    return hashlib.sha256(obj).hexdigest()[:length]


@contextmanager
def float32():
    "Make new tensors float32 inside the block, or in the decorated function."
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try: yield
    finally: torch.set_default_dtype(before)


def to_levels(
    x: torch.Tensor, # float, any shape; values outside [0,1] are clamped
    levels: int, # how many values a pixel can take, 2..256
) -> torch.Tensor: # uint8 in 0..levels-1
    """Round to the nearest level, halves up.

    Raises `TypeError` for integers, and `ValueError` for NaN, or unless there are 2 to 256 levels."""
    if not 2 <= levels <= 256: raise ValueError(f"a pixel must have 2..256 levels, not {levels}")
    if not x.is_floating_point(): raise TypeError(f"to_levels: expected floating point, found {x.dtype}")
    if x.isnan().any(): raise ValueError("to_levels: found NaN, which has no level")
    return (x.float().clamp(0, 1)*(levels-1)+0.5).floor().to(torch.uint8)


def preconditioning(
    sigma, # [n], noise levels σ > 0
    sigma_data: float, # standard deviation of the images in [-1,1]
): # -> c_skip, c_out, c_in [n,1,1,1] and c_noise [n]
    "Compute the preconditioning of Karras et al. 2022 (arXiv 2206.00364), table 1, column EDM."
    level, d = sigma.reshape(-1, 1, 1, 1), sigma_data
    total = (level**2 + d**2).sqrt()
    return d**2/total**2, level*d/total, 1/total, sigma.log()/4


class Denoiser(nn.Module):
    "Predict the clean image D(x;σ) = E[y|x] from a noisy one: Karras et al. 2022, equation 7."
    def __init__(self,
        net, # takes ([n,C,H,W], [n]) and returns an object with `.sample` [n,C,H,W], such as a UNet2DModel
        sigma_data: float=0.5, # standard deviation of the images in [-1,1]
        autocast=None, # dtype in which the network computes, such as torch.bfloat16, or None for its own
    ):
        super().__init__()
        self.net, self.sigma_data, self.autocast = net, sigma_data, autocast

    def forward(self,
        x, # [n,C,H,W], images in [-1,1] plus noise
        sigma, # [n], the noise levels
    ): # -> [n,C,H,W], in the dtype of x
        c_skip, c_out, c_in, c_noise = preconditioning(sigma.to(x.dtype), self.sigma_data)
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            out = self.net((c_in*x).float(), c_noise.float()).sample
        return c_skip*x + c_out*out.to(x.dtype)


@torch.no_grad()
def heun(
    denoiser, # D(x;σ), takes ([n,C,H,W], [n])
    x, # [n,C,H,W], noise of standard deviation sigmas[0]
    sigmas, # [steps+1], falling noise levels
    progress=iter, # wraps the steps, such as tqdm
): # -> float64 [n,C,H,W]
    "Sample with the deterministic second-order Heun solver: Karras et al. 2022, algorithm 1."
    def slope(x, sigma): return (x - denoiser(x, x.new_full((), sigma.item()).expand(len(x))))/sigma
    x = x.double()
    for sigma, next_sigma in progress(list(zip(sigmas[:-1], sigmas[1:]))):
        first = slope(x, sigma)
        euler = x + (next_sigma - sigma)*first
        x = euler if next_sigma == 0 else x + (next_sigma - sigma)*(first + slope(euler, next_sigma))/2
    return x


@torch.no_grad()
def dpm_multistep(
    net, # UNet2DModel
    scheduler, # EDMDPMSolverMultistepScheduler, its steps set
    x, # [n,C,H,W], noise of standard deviation scheduler.sigmas[0]
    autocast=None, # dtype in which the network computes, or None for its own
    progress=iter, # wraps the steps, such as tqdm
    generators=None, # one per image, if the scheduler's algorithm draws noise
): # -> float64 [n,C,H,W]
    "Sample with one evaluation per step, with diffusers' second-order solver, deterministic or stochastic."
    scheduler.set_begin_index(0)
    x = x.double()
    for t in progress(scheduler.timesteps):
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            out = net(scheduler.scale_model_input(x, t).float(), t.expand(len(x))).sample
        x = scheduler.step(out.double(), t, x, generator=generators).prev_sample
    return x


def stochastic_scheduler(scheduler: EDMDPMSolverMultistepScheduler): # -> the same
    "Make a scheduler with the same noise levels for SDE-DPM-Solver++ (Lu et al. 2022, appendix B)."
    return EDMDPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="sde-dpmsolver++")


def solve(
    net, # UNet2DModel
    scheduler, # EDMDPMSolverMultistepScheduler, its steps set
    solver: str, # heun, multistep or stochastic; it must fit the scheduler
    x, # [n,C,H,W], noise of standard deviation scheduler.sigmas[0]
    autocast=None, # dtype in which the network computes, or None for its own
    progress=iter, # wraps the steps, such as tqdm
    generators=None, # one per image, if the solver is stochastic
): # -> float64 [n,C,H,W]
    "Turn noise into images with one of the solvers."
    if solver == "heun":
        denoiser = Denoiser(net, scheduler.config.sigma_data, autocast)
        return heun(denoiser, x, scheduler.sigmas.double(), progress)
    return dpm_multistep(net, scheduler, x, autocast, progress, generators)


class EDMPipeline(DiffusionPipeline):
    "Sample images from an unconditional EDM diffusion model."
    model_cpu_offload_seq = "unet"
    def __init__(self,
        unet: UNet2DModel, # the averaged network
        scheduler: EDMDPMSolverMultistepScheduler, # holds sigma_data and the noise levels
        levels: int=256, # number of values of a pixel
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(levels=levels)

    @property
    def shape(self): # C, H, W
        return (self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size)

    def identity(self) -> dict: # of values that JSON can hold
        "Return what decides the samples: digest of the weights, scheduler's configuration, levels and shape."
        state = sorted(self.unet.state_dict().items())
        weights = digest(b"".join(k.encode() + v.float().cpu().numpy().tobytes() for k, v in state))
        scheduler = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        return {"weights": weights, "scheduler": scheduler, "levels": self.config.levels,
                "shape": list(self.shape)}

    @torch.no_grad()
    @float32()
    def __call__(self,
        batch_size: int=1, # images
        generator=None, # a `torch.Generator`, or a list with one per image; None is torch's own
        num_inference_steps: int=18, # of the solver
        output_type: str="pil", # pil; np or pt: float32 in [0,1], channels last or first; latent: float64
        return_dict: bool=True, # return an object with `images` rather than a tuple
        solver: str="heun", # heun (two evaluations per step, one in the last), multistep, stochastic (one)
        precision: str="float32", # in which a network of float32 computes: float32 or bfloat16
    ):
        "Sample images. Raises `ProjectError` if they are not finite, `ValueError` for unfit arguments."
        if solver not in ("heun", "multistep", "stochastic"):
            raise ValueError(f"solver {solver!r} is none of heun, multistep, stochastic")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is none of pil, np, pt, latent")
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision {precision!r} is none of float32, bfloat16")
        if min(batch_size, num_inference_steps) < 1:
            raise ValueError(
                f"batch_size={batch_size} and num_inference_steps={num_inference_steps} must be positive")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"batch_size={batch_size} does not fit {len(generator)} generators")
        autocast, device = {"float32": None, "bfloat16": torch.bfloat16}[precision], self._execution_device
        scheduler = stochastic_scheduler(self.scheduler) if solver == "stochastic" else self.scheduler
        scheduler.set_timesteps(num_inference_steps, device=device)
        noise = randn_tensor((batch_size, *self.shape), generator, device, torch.float32)
        x = scheduler.sigmas[0].double()*noise.double()
        x = self.solve(scheduler, solver, x, autocast, generator)
        self.maybe_free_model_hooks()
        if not x.isfinite().all(): raise ProjectError(
            "The samples are not finite: the weights are damaged or the precision is too low. "
            "Try precision float32, or train the diffusion model again.")
        images = self.output(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def solve(self, scheduler, solver, x, autocast, generator): # as the function `solve`
        def net(x, t): return self.unet(x.to(self.unet.dtype), t)
        return solve(net, scheduler, solver, x, autocast, self.progress_bar, generator)

    def output(self,
        x, # float64 [n,C,H,W] about [-1,1]
        output_type: str, # as in a call
    ):
        "Convert images to the requested type."
        if output_type == "latent": return x
        images = to_levels((x.float() + 1)/2, self.config.levels).float()/(self.config.levels - 1)
        if output_type == "pt": return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return images if output_type == "np" else self.numpy_to_pil(images)
