r"""Weights of others: Mamba and Mamba-2 under the names of transformers and of mamba-ssm, and back.

These functions map dictionaries: state dicts, and configurations as they stand in `config.json`. Nothing is computed,
so that weights that are mapped there and back are the same to the bit. Neither library is needed.

One Mamba block without its norm and residual connection is called a mixer in both libraries, and its weights have the
same names there. :func:`from_mixer` and :func:`to_mixer` map them to those of :class:`ssmkit.Mamba` and
:class:`ssmkit.Mamba2`.

A whole language model is described by an :class:`Architecture`. In ssmkit its weights are those of this network:

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

The networks of both libraries compute the residual connections in float32 if they are told to (`residual_in_fp32`) and
their weights are of a lower precision; this one computes in the dtype of its weights.
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
