"""What options choose from, by the words that a user types."""

from __future__ import annotations

from enum import StrEnum


class Family(StrEnum):
    up = "up"
    gate = "gate"
    down = "down"
    both = "both"
    all = "all"


FAMILIES_OF = {
    Family.both: (Family.up, Family.gate),
    Family.all: (Family.up, Family.gate, Family.down),
}
"""The families that a word stands for; every other word stands for itself."""


class Method(StrEnum):
    globe = "globe"
    """a bank of atoms with codes and adapters, by alternating minimisation"""
    svd = "svd"
    """truncated SVD of every expert"""
    shared_basis = "shared_basis"
    """one basis for all experts (Tucker-1; MoLAE, arXiv 2503.23100)"""
    mean_svd = "mean_svd"
    """mean expert plus truncated SVD of the differences (structure of D2-MoE, arXiv 2502.17298)"""
    group_svd = "group_svd"
    """one basis per group of experts: the linear special case with one-hot codes"""
    mobe = "mobe"
    """MoBE (arXiv 2508.05257) as its public script starts and trains it"""
    mobe_corrected = "mobe_corrected"
    """MoBE's objective and optimiser from a start that really is a warm start"""
    slbf = "slbf"
    """low-rank atoms, as many as experts (arXiv 2610.09342)"""
    rtn = "rtn"
    """weights rounded to the nearest level"""
    gptq = "gptq"
    """weights rounded with error feedback (GPTQ, arXiv 2210.17323)"""
    gptq_rotated = "gptq_rotated"
    """the same after random rotations of both sides (QuIP, arXiv 2307.13304)"""


OBJECTIVES = ("relfrob", "kept", "kept_model", "seconds")
"""Figures of a run that a sweeper can minimise."""

ADAM_METHODS = (Method.mobe, Method.mobe_corrected, Method.slbf)


WEIGHT_METHODS = (Method.rtn, Method.gptq, Method.gptq_rotated)
"""Methods that round the weights themselves; they need `bank.bits`."""


class Scope(StrEnum):
    family = "family"
    families = "families"
    layers = "layers"


class Over(StrEnum):
    bank = "bank"
    model = "model"


class SampleMethod(StrEnum):
    first_n = "first_n"
    evenly_spaced = "evenly_spaced"


class Centre(StrEnum):
    none = "none"
    scalar = "scalar"
    expert_mean = "expert_mean"


class Scale(StrEnum):
    none = "none"
    family = "family"
    expert = "expert"
    row = "row"


class Metric(StrEnum):
    auto = "auto"
    none = "none"
    experts = "experts"
    inputs = "inputs"


class Store(StrEnum):
    fit = "fit"
    checkpoint = "checkpoint"


class Activation(StrEnum):
    identity = "identity"
    silu = "silu"
    tanh = "tanh"
    gelu = "gelu"


class Seeding(StrEnum):
    random = "random"
    kmeans = "kmeans"
    group_svd = "group_svd"
    aligned = "aligned"
    aligned_svd = "aligned_svd"


class FirstCodes(StrEnum):
    mixed = "mixed"
    nnls = "nnls"
    simplex = "simplex"


class CodeMap(StrEnum):
    entmax15 = "entmax15"
    sparsemax = "sparsemax"


class Dictionary(StrEnum):
    gauss_newton = "gauss_newton"
    mod = "mod"


class Curve(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    exponential = "exponential"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class FitDtype(StrEnum):
    float32 = "float32"
    float64 = "float64"


class ExportDtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class CurvatureDtype(StrEnum):
    auto = "auto"
    same = "same"
    bfloat16 = "bfloat16"


class WandbMode(StrEnum):
    disabled = "disabled"
    offline = "offline"
    online = "online"
