"""Every error the appliance raises on purpose, each with the thing it is about and what to do next.

    ApplianceError
    ├── ConfigError              appliance.toml: unknown key, wrong value, missing file
    ├── CatalogError             a manifest, recipe or graph under models_onnx/ is wrong
    │   ├── GraphError           cycle, unknown expert, impossible condition
    │   ├── DigestMismatch       a file's bytes are not the ones its manifest names
    │   └── VariantError         an expert's int8 variant cannot serve; the expert does, in full precision
    ├── ModelError               an ONNX file cannot serve
    │   ├── GoldenMismatch       it answers its own golden samples otherwise than it should
    │   └── UnsafeModel          it crashed, or broke a limit of, the child process that checked it
    ├── StoreError               a compiled artefact is missing or damaged
    ├── ExportError              a PyTorch expert did not survive conversion
    ├── MessageError             a message that cannot become a request; `reason` names its error topic
    │   └── PictureError         its payload is not a picture that we accept
    ├── LoadError                weights could not be brought into memory
    ├── RunError                 an expert could not be run
    ├── OutOfMemory              the device had less memory than the ledger thought
    │   └── Fragmented           it has enough, but in pieces; one that leaves may end it
    ├── Cancelled                a load or a run was given up because nobody wants it any more
    ├── DeviceError              an accelerator is missing, refuses, or is not what was asked for
    ├── NoRoom                   the memory budget cannot hold what was asked
    ├── BrokerError              no broker, or one that refuses us
    │   └── CertificateError     a certificate or key of the link cannot be used, or is not accepted
    └── RecordsError             the spool or the verdict record cannot be trusted
        └── NotSpooled           that picture is not in the spool; the spool is well

They are raised where the fact is known and become an answer at two borders only: a worker (an event, then a verdict
or an error message with a reason) and the command line (one line and an exit code).
"""


class ApplianceError(Exception):
    """Something named went wrong: `what` says what, `remedy` what to do, `reason` is the short code machines read."""

    reason = "error"

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what} ({remedy})" if remedy else what)
        self.what, self.remedy = what, remedy


class ConfigError(ApplianceError):
    reason = "config"


class CatalogError(ApplianceError):
    reason = "catalog"


class GraphError(CatalogError):
    reason = "graph"


class DigestMismatch(CatalogError):
    reason = "digest-mismatch"

    def __init__(self, path: str, expected: str, found: str) -> None:
        super().__init__(
            f"{path} has SHA-256 {found[:12]}…, its manifest says {expected[:12]}…",
            "restore the file, or export the expert again",
        )
        self.path, self.expected, self.found = path, expected, found


class VariantError(CatalogError):
    reason = "variant"

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy or "restore it, or make it again: appliance export --int8")


class ModelError(ApplianceError):
    reason = "model"


class GoldenMismatch(ModelError):
    reason = "golden-mismatch"


class UnsafeModel(ModelError):
    reason = "model-unsafe"


class StoreError(ApplianceError):
    reason = "store"


class ExportError(ApplianceError):
    reason = "export"


class MessageError(ApplianceError):
    """A message that cannot become a request. `reason` is the last level of the error topic it is answered on."""

    def __init__(self, reason: str, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.reason = reason


class PictureError(MessageError):
    """A payload that is not a picture we accept; `reason` starts with `picture-`."""


class LoadError(ApplianceError):
    reason = "load"


class RunError(ApplianceError):
    reason = "run"


class OutOfMemory(ApplianceError):
    reason = "out-of-memory"


class Fragmented(OutOfMemory):
    reason = "fragmented"


class Cancelled(ApplianceError):
    reason = "cancelled"


class DeviceError(ApplianceError):
    reason = "device"


class NoRoom(ApplianceError):
    reason = "no-room"

    def __init__(self, need_bytes: int, could_free_bytes: int) -> None:
        super().__init__(
            f"{need_bytes} more bytes are needed, {could_free_bytes} could be freed", "raise the weights budget"
        )
        self.need_bytes, self.could_free_bytes = need_bytes, could_free_bytes


class BrokerError(ApplianceError):
    reason = "broker"


class CertificateError(BrokerError):
    reason = "certificate"


class ProfileError(ApplianceError):
    reason = "profile"


class RecordsError(ApplianceError):
    reason = "records"


class NotSpooled(RecordsError):
    def __init__(self, id: str) -> None:
        super().__init__(f"no picture {id} in the spool", "it has its verdict already")
        self.id = id
