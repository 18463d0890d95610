"""Every English string of the page, and the sentences that are put together from numbers: a module a tab.

What several tabs say is here by its bare name, `words.NAMES`; the rest as `words.blind.NOTE`. Knows results, not HTML:
nothing here is escaped, ui/html/cards.py does that.
"""

from ui.words import (  # noqa: F401
    benchmarks,
    blind,
    compare,
    explain,
    gallery,
    how,
    post,
    prompt,
    quality,
    recipe,
    run,
    stage,
    verdict,
    warming,
)
from ui.words.common import *  # noqa: F403
