"""What a Linear layer is for, by its name, so that tables and maps of layers call it the same. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

ROLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "q": ("Attention q", r"att(n|ention)\d?\.to_q$"),
        "k": ("Attention k", r"att(n|ention)\d?\.to_k$"),
        "v": ("Attention v", r"att(n|ention)\d?\.to_v$"),
        "out": ("Attention out", r"att(n|ention)\d?\.to_out"),
        "text_q": ("Text q", r"add_q_proj$"),
        "text_k": ("Text k", r"add_k_proj$"),
        "text_v": ("Text v", r"add_v_proj$"),
        "text_out": ("Text out", r"to_add_out$"),
        "text_mlp_in": ("Text MLP in", r"((ff_context|txt_mlp)\.net\.0\.proj|ff_context\.linear_in)$"),
        "text_mlp_out": ("Text MLP out", r"((ff_context|txt_mlp)\.net\.2|ff_context\.linear_out)$"),
        "mlp_in": ("MLP in", r"(\.net\.0\.proj|(^|\.)proj_mlp|\.ff\.linear_in|\.w[13]|to_qkv_mlp_proj)$"),
        "mlp_out": ("MLP out", r"(\.net\.2|\.proj_out|\.ff\.linear_out|\.w2)$"),
        "text_modulation": ("Text modulation", r"(norm1_context\.linear|txt_mod\.\d+|modulation_txt\.linear)$"),
        "modulation": (
            "Modulation",
            r"(blocks.*norm1?\.linear|img_mod\.\d+|gate_logits|modulation(_img)?\.linear|(refiner|layers).*adaLN_modulation\.\d+)$",
        ),
        "time": (
            "Time embedding",
            r"(timestep_embedder|guidance_embedder|time_embed(der)?\.|time_proj$|^t_embedder|adaln|av_cross_attn)",
        ),
        "pooled_text": ("Pooled text in", r"time_text_embed\.text_embedder\."),
        "text_in": (
            "Text in",
            r"(context_embedder|cap_embedder|condition_embedder\.text_embedder|txt_in|caption_projection)",
        ),
        "picture_in": ("Picture in", r"(^(all_)?x_embedder|^img_in|^(audio_)?proj_in)"),
        "last_norm": ("Last modulation", r"(norm_out|final_layer.*adaLN_modulation)"),
        "last": ("Last projection", r"(^(audio_)?proj_out|final_layer.*\.linear)$"),
        "other": ("Other", r""),
    }
)
"""Role -> words, and what a layer's name contains; in the order of `_TESTED`, the first that matches decides."""
OF_PICTURES = frozenset({"text_modulation", "modulation", "time", "pooled_text", "last_norm"})
"""Roles whose layers can multiply one row a picture; all others have one a token."""
_TESTED = ("text_mlp_in", "text_mlp_out", "text_modulation", "last", "time", *ROLES)


def role_of(name: str) -> str:
    """The role of a layer of a diffusers transformer: a key of `ROLES`."""
    return next(role for role in _TESTED if re.search(ROLES[role][1], name))


def role_name(name: str) -> str:
    """The same in words."""
    return ROLES[role_of(name)][0]
