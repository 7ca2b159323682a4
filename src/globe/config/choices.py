"""What options choose from, by the words that a user types: each member's value is its name."""

from __future__ import annotations

from enum import StrEnum

Family = StrEnum("Family", ["up", "gate", "down", "both", "all"])
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

Scope = StrEnum("Scope", ["family", "families", "layers"])
Over = StrEnum("Over", ["bank", "model"])
SampleMethod = StrEnum("SampleMethod", ["first_n", "evenly_spaced"])
Centre = StrEnum("Centre", ["none", "scalar", "expert_mean"])
Scale = StrEnum("Scale", ["none", "family", "expert", "row"])
Metric = StrEnum("Metric", ["auto", "none", "experts", "inputs"])
Store = StrEnum("Store", ["fit", "checkpoint"])
Activation = StrEnum("Activation", ["identity", "silu", "tanh", "gelu"])
Seeding = StrEnum("Seeding", ["random", "kmeans", "group_svd", "aligned", "aligned_svd"])
FirstCodes = StrEnum("FirstCodes", ["mixed", "nnls", "simplex"])
CodeMap = StrEnum("CodeMap", ["entmax15", "sparsemax"])
Dictionary = StrEnum("Dictionary", ["gauss_newton", "mod"])
Curve = StrEnum("Curve", ["constant", "linear", "cosine", "exponential"])
Device = StrEnum("Device", ["auto", "cpu", "cuda", "mps"])
FitDtype = StrEnum("FitDtype", ["float32", "float64"])
ExportDtype = StrEnum("ExportDtype", ["auto", "float32", "bfloat16", "float16", "float64"])
CurvatureDtype = StrEnum("CurvatureDtype", ["auto", "same", "bfloat16"])
WandbMode = StrEnum("WandbMode", ["disabled", "offline", "online"])
