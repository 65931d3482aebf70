"""fastattn under other libraries: one adapter a file, each imported when it is first asked for.

    torch_sdpa, torch_flash     torch's own attention
    transformers                attn_implementation="fastattn"
    flash_attn                  the names and signatures of the package flash-attn
"""

from .convert import Conversion, convert
from .ledger import Report, report
from .torch_sdpa import Use, install, uninstall, use

__all__ = ["Conversion", "Report", "Use", "convert", "install", "report", "uninstall", "use"]
