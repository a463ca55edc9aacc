"""Numerical operations: fast functions, and for each a naive version that states its definition."""

from .cauchy import cauchy as cauchy
from .cauchy import cauchy_roots_of_unity as cauchy_roots_of_unity
from .cauchy import naive_cauchy as naive_cauchy
from .conv import causal_conv as causal_conv
from .conv import naive_causal_conv as naive_causal_conv
from .conv import two_sided_conv as two_sided_conv
from .krylov import krylov as krylov
from .krylov import naive_krylov as naive_krylov
from .recurrence import naive_recurrence as naive_recurrence
from .recurrence import recurrence as recurrence
from .selective import naive_selective_scan as naive_selective_scan
from .selective import selective_scan as selective_scan
from .ssd import naive_ssd_scan as naive_ssd_scan
from .ssd import ssd_scan as ssd_scan
from .vandermonde import naive_vandermonde as naive_vandermonde
from .vandermonde import naive_vandermonde_transpose as naive_vandermonde_transpose
from .vandermonde import vandermonde as vandermonde
from .vandermonde import vandermonde_transpose as vandermonde_transpose

__all__ = [
    "cauchy",
    "cauchy_roots_of_unity",
    "causal_conv",
    "krylov",
    "naive_cauchy",
    "naive_causal_conv",
    "naive_krylov",
    "naive_recurrence",
    "naive_selective_scan",
    "naive_ssd_scan",
    "naive_vandermonde",
    "naive_vandermonde_transpose",
    "recurrence",
    "selective_scan",
    "ssd_scan",
    "two_sided_conv",
    "vandermonde",
    "vandermonde_transpose",
]
