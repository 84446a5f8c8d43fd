"""What a model still does with a long context when its keys and values are kept in fewer bytes.

Every task is token ids made from a seed, and a scorer that drives anything with the methods of an engine
(:mod:`.drivers`). The context is one ``prefill`` after ``reset``, at whose end a cache may compress; all that is scored
comes after it, in calls of its own. Every answer is teacher-forced (:mod:`.sessions`), so that one pass tells what
greedy decoding would say and how likely the right answer was, which small models need.

==================  ================================================================================================
:mod:`.copying`      random words, then the same words again: each needs the place where it stood
:mod:`.facts`        a fact in a text, asked for at its end (a needle); several facts, asked for one after the other
:mod:`.key_value`    a list of keys and codes, looked up by key
:mod:`.continuation` real text: divergence from the full cache, token by token
==================  ================================================================================================

No figure stands alone: :mod:`.reach` puts beside a cache's answers what the full cache answers itself, since below that
nothing was lost.
"""
