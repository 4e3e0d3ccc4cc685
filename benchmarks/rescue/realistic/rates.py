"""The right rate of each way of training, found by ``calibrate.py``."""

RATES: dict[str, float] = {
    "gpt/decay_groups/warmup_cosine/clip": 5e-3,
    "gpt/lion/warmup_cosine/clip": 2e-3,
    "gpt/muon/warmup_cosine/clip": 5e-2,
    "lstm/adam/clip": 1e-2,
    "lstm/nesterov/cosine/clip": 2.0,
    "vit/decay_groups/warmup_cosine/clip": 5e-3,
    "vit/lion/cosine/clip": 2e-3,
    "vit/adamw/cosine/bf16": 2e-3,
    "resnet/nesterov/warmup_cosine": 1e-1,
    "resnet/muon/cosine": 1e-2,
    "resnet/sam/cosine": 2e-2,
    "unet/nesterov/warmup_cosine": 2e-2,
    "unet/adam/bf16": 5e-4,
    "towers/decay_groups/warmup_cosine/clip": 1e-3,
    "towers/lion/clip": 1e-4,
    "ctc/adamw/warmup/clip": 1e-3,
    "vae/adam/ema": 2e-3,
    "vae/decay_groups/warmup_cosine/clip": 5e-3,
    "flow/adam/clip": 1e-3,
    "flow/decay_groups/warmup_cosine/x2": 5e-3,
}
