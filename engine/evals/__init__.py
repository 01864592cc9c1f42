"""Judging what an encoder learned with the papers' protocols.

A protocol is a file in `protocols/`, found by its name. It has
    Settings                                   a frozen dataclass with defaults; raises BadInput for numbers that make no sense
    READS = "objects"                          the kind of set it reads: a key of KINDS; left out, images with classes
    WANTS = "tokens" or "model"                left out, pooled features are all that is extracted
    check(train, test, settings)               raises BadInput if these sets can't be judged, before any feature exists
    evaluate(train, test, settings) -> Result  of `Features`, computed on the device that holds them; with WANTS = "model"
    evaluate(subject, train, test, settings)   of a `Subject` and the sets themselves
and maybe
    check_model(subject, train, test, settings)  raises BadInput if these weights can't be judged, before anything is encoded
    wants(settings)                            in the place of WANTS, where it goes by the settings; then there is, for the model,
    evaluate_model(subject, train, test, settings)  beside `evaluate`
so adding a protocol is adding a file. Of videos there is no training set: `train` is None.

Here is what other rooms use. The files inside name one another, not this one.
"""

from engine.evals.course import Course
from engine.evals.features import Encoder, Features, Tokens, raw_pixels
from engine.evals.judging import encode, evaluate, extract_together
from engine.evals.registry import ALL, protocol, protocols, reads, settings_for, wants
from engine.evals.result import Result
from engine.evals.sets import KINDS, Sets, check
from engine.evals.subject import Subject

__all__ = [
    "ALL", "KINDS", "Course", "Encoder", "Features", "Result", "Sets", "Subject", "Tokens", "check", "encode", "evaluate",
    "extract_together", "protocol", "protocols", "raw_pixels", "reads", "settings_for", "wants",
]  # fmt: skip
