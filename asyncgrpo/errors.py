"""Every error that asyncgrpo raises on purpose: BadInput (exit code 2), RunError (3), their kinds.

Messages say what happened with the value, what is allowed, and what to change.
"""

from __future__ import annotations

EXIT_DONE, EXIT_BAD_INPUT, EXIT_ROLE_FAILED, EXIT_INTERRUPTED = 0, 2, 3, 130


class AsyncGRPOError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what a command ends with."""

    exit_code = EXIT_ROLE_FAILED


class BadInput(AsyncGRPOError):
    """What the user gave cannot work as it is; a second try would meet the same end."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(BadInput):
    """A setting is unknown, has the wrong type, is out of range or contradicts another."""


class DataError(BadInput):
    """A data file is missing or malformed."""


class AbsentData(DataError):
    """A data file or data set is not on this machine; a dry run goes on without it."""


class ModelError(BadInput):
    """A model folder is missing or incomplete, or its architecture is not supported."""


class AbsentModel(ModelError):
    """A model of the hub is not on this machine; a dry run goes on without it."""


class RewardError(BadInput):
    """A reward function cannot be found or does not keep its contract."""


class AlgorithmError(BadInput):
    """A user's own loss, correction, advantage, aggregation or KL breaks its contract."""


class RunError(AsyncGRPOError):
    """Something broke while the run was going."""


class RoleFailed(RunError):
    """A role's process ended although the run had not."""


class PeerTimeout(RunError):
    """A peer did not answer within its deadline."""

    def __init__(self, peer: str, waited_for: str, seconds: float) -> None:
        super().__init__(f"{peer} did not answer within {seconds:g} s ({waited_for})")


class WireError(RunError):
    """A message does not follow the schema."""


class SchemaMismatch(WireError):
    """The other side speaks another version of the wire format."""


class CheckpointError(RunError):
    """A checkpoint cannot be written, or does not fit or hold."""


class StalenessError(RunError):
    """A token past the staleness bound reached the learner."""


class EngineError(RunError):
    """The inference engine refused or lost something."""


class WeightsError(RunError):
    """Weights are not what they should be."""


class LedgerError(RunError):
    """The ledger of leases cannot be kept or read, or its books do not balance."""
