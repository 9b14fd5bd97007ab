"""Every error that asyncgrpo raises on purpose, in one tree.

    AsyncGRPOError
    ├── BadInput                what the user gave cannot work; exit code 2
    │   ├── ConfigError         a setting: unknown, wrong type, out of range, contradictory
    │   ├── DataError           a data file: malformed (with its line number)
    │   │   └── AbsentData      .. or not on this machine; a dry run goes on without it
    │   ├── ModelError          a model folder: no config, no tokenizer, no weights, unsupported
    │   │   └── AbsentModel     .. or a hub name that is not on this machine
    │   ├── RewardError         a reward function: not found, raises, wrong count, not finite
    │   └── AlgorithmError      a user's loss, correction .. returns something of the wrong shape
    └── RunError                something broke while running; exit code 3
        ├── RoleFailed          a process ended that should not have
        ├── PeerTimeout         a peer did not answer within its deadline (it is named)
        ├── WireError           a message that does not follow the schema
        │   └── SchemaMismatch  ... because its sender is another version
        ├── CheckpointError     a checkpoint cannot be written, or is not as it was written
        ├── StalenessError      a token past the staleness bound reached the learner
        ├── EngineError         the inference engine refused or lost something
        ├── WeightsError        weights were not what they should be after a broadcast
        └── LedgerError         the ledger cannot be kept or read, or its books do not balance

Messages say what happened with the value, what is allowed, and what to change.
"""

from __future__ import annotations

EXIT_DONE, EXIT_BAD_INPUT, EXIT_ROLE_FAILED, EXIT_INTERRUPTED = 0, 2, 3, 130


class AsyncGRPOError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what a command ends with."""

    exit_code = EXIT_ROLE_FAILED


class BadInput(AsyncGRPOError):
    """The user's input cannot work as it is."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(BadInput):
    """A setting is unknown, has the wrong type, is out of range or contradicts another."""


class DataError(BadInput):
    """A data file is missing or malformed."""


class AbsentData(DataError):
    """A data file or data set is not on this machine."""


class ModelError(BadInput):
    """A model folder is missing or incomplete, or its architecture is not supported."""


class AbsentModel(ModelError):
    """A model of the hub is not on this machine."""


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
        self.peer = peer


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
