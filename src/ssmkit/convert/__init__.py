r"""Conversion of Mamba and Mamba-2 weights from transformers and mamba-ssm, and to them.

These functions convert dictionaries: state dicts, and configurations as in `config.json`. They rename, split and join
tensors and compute nothing, so that converting there and back gives the same bits. Neither library has to be installed.

Both libraries call a Mamba block without its norm and residual connection a mixer, and use the same names for its
weights. :func:`from_mixer` and :func:`to_mixer` convert these for :class:`ssmkit.Mamba` and :class:`ssmkit.Mamba2`.

A whole language model is described by an :class:`Architecture`. Its weights in ssmkit are those of this network:

.. code-block:: python

    def block():
        mixer = architecture.layer(**architecture.options)
        return ssmkit.Residual({"norm": nn.RMSNorm(d, architecture.eps), "mixer": mixer})

    ssmkit.Sequential({
        "embedding": nn.Embedding(architecture.vocab_size, d),
        "blocks": ssmkit.Sequential(*(block() for _ in range(architecture.n_layers))),
        "norm": nn.RMSNorm(d, architecture.eps),
        "head": nn.Linear(d, architecture.vocab_size, bias=False),
    })

This network computes in the dtype of its weights. With weights of lower precision, both libraries can compute the
residual connections in float32 (`residual_in_fp32`); to do so here, convert the weights to float32.
"""

from .architecture import Architecture as Architecture
from .mixers import from_mixer as from_mixer
from .mixers import to_mixer as to_mixer
from .models import from_mamba_ssm as from_mamba_ssm
from .models import from_transformers as from_transformers
from .models import to_mamba_ssm as to_mamba_ssm
from .models import to_transformers as to_transformers

__all__ = [
    "Architecture",
    "from_mamba_ssm",
    "from_mixer",
    "from_transformers",
    "to_mamba_ssm",
    "to_mixer",
    "to_transformers",
]
