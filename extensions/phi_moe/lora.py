"""TODO"""

from extensions.phi_moe.layer import PhiMoE  # noqa: F401
