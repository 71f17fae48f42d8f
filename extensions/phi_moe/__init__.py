"""A mixture-of-experts MLP for LitGPT: see README.md beside this file."""

from extensions.phi_moe.errors import MoEError
from extensions.phi_moe.install import install
from extensions.phi_moe.layer import PhiMoE
from extensions.phi_moe.placement import place_experts
from extensions.phi_moe.routing import Routing
from extensions.phi_moe.settings import Settings

__all__ = ["MoEError", "PhiMoE", "Routing", "Settings", "install", "place_experts"]
