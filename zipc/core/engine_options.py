"""What an engine of TensorRT is built to be, beyond what its graph says."""

from __future__ import annotations

from dataclasses import dataclass

from zipc.core.errors import UsageError

REFIT, VERSION_COMPATIBLE, LEVEL = "refit", "version-compatible", "level"
LEVELS = range(6)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """`refit`: its weights can be replaced without a build; `version_compatible`: later versions of
    the same major TensorRT load it; `level`: how long the builder looks for kernels, 3 by itself.
    """

    refit: bool = False
    version_compatible: bool = False
    level: int | None = None

    @staticmethod
    def parse(text: str) -> EngineOptions:
        """The options of "refit,version-compatible,level=5"; those by default of "".

        Raises:
            UsageError: there is no such option, or it is given twice.
        """
        found: dict[str, str] = {}
        for part in text.split(",") if text else ():
            name, _, value = part.strip().partition("=")
            known = name in (REFIT, VERSION_COMPATIBLE) and not value
            level = name == LEVEL and value.isdecimal() and int(value) in LEVELS
            if not (known or level) or name in found:
                raise UsageError(
                    f"--engine-options {text!r}: {part.strip()!r} is not one, or is given twice. "
                    f"Give some of {REFIT}, {VERSION_COMPATIBLE} and {LEVEL}=0 to "
                    f"{LEVEL}={LEVELS[-1]}, with commas."
                )
            found[name] = value
        level_asked = int(found[LEVEL]) if LEVEL in found else None
        return EngineOptions(REFIT in found, VERSION_COMPATIBLE in found, level_asked)

    @property
    def flags(self) -> list[str]:
        """The same for trtexec."""
        flags = ["--refit"] if self.refit else []
        flags += ["--versionCompatible"] if self.version_compatible else []
        return flags if self.level is None else [*flags, f"--builderOptimizationLevel={self.level}"]


BY_DEFAULT = EngineOptions()
