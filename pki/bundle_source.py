"""Where a trust bundle comes from: our roots and the public ones, as they are kept. It opens no key, writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pki.distribution import BUNDLE, CA
from pki.layout import STATE
from pki.trust import make_files, public_roots, read_roots, roots_of, system_bundle_path

SYSTEM, NONE = "system", "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the bundle comes from: one of the first three.

    pki     a store
    bundle  a trust directory
    roots   a file of our roots in PEM, all that a pod needs to be given
    public  SYSTEM, NONE or a file; None: those in `bundle`, else SYSTEM
    """

    pki: Path | None = None
    bundle: Path | None = None
    roots: Path | None = None
    public: str | None = None

    def paths(self, environment: Mapping[str, str]) -> tuple[str, ...]:
        """The files that change before another bundle can be read."""
        ours = (self.pki and self.pki / STATE, self.bundle and self.bundle / CA, self.roots)
        system = (environment.get("SSL_CERT_FILE"), system_bundle_path()) if self._is_system else ()
        public = () if self._is_system or self.public == NONE else (self.public or self._bundle_path,)
        return tuple(str(path) for path in (*ours, *system, *public) if path)

    def read(self, mount_path: str, environment: Mapping[str, str], written_to: Path | None = None) -> dict[str, bytes]:
        """The files of a trust directory that programs will find at `mount_path`. Raises TrustError.

        written_to  where they will stand, if that is another path: the bundle there is no source
        """
        ours = self._ours()
        return make_files(mount_path, ours, self._public(written_to or Path(mount_path), environment))

    @property
    def _is_system(self) -> bool:
        return self.public == SYSTEM or (self.public is None and self.bundle is None)

    @property
    def _bundle_path(self) -> Path | None:
        return self.bundle / BUNDLE if self.bundle else None

    def _ours(self) -> bytes:
        if self.pki:
            return roots_of(self.pki)
        if self.bundle:
            return read_roots(self.bundle / CA, "--bundle")
        return read_roots(self.roots or Path(), "--root")

    def _public(self, directory: Path, environment: Mapping[str, str]) -> bytes:
        if self.public == NONE:
            return b""
        if self._is_system:
            return public_roots(environment, directory)
        if self.public:
            return read_roots(Path(self.public), "--public")
        return read_roots(self._bundle_path or Path(), "--bundle")
