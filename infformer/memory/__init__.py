"""What a layer remembers. State in, state out: nothing that outlives a call is kept on a module.

All kinds are imported, as a stored configuration may name any of them.
"""

from infformer.memory import cache, compressive, fast_weights, long_term_options

__all__ = ["cache", "compressive", "fast_weights", "long_term_options"]
