"""What the evaluation refuses."""


class EvaluationError(ValueError):
    """A model, a text or an option that cannot be evaluated; the message says what to do."""
