"""The proof that distillation helps, repeated by one command: the work of ``distill-d2 proof``.

``rows`` says what is trained, ``plan`` in which order, ``jobs`` what a run is and how far it has come,
``processes`` runs them, ``gates`` stop what would prove nothing, ``table`` tells what came out.
"""
