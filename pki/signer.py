"""Keys that never leave a token: PKCS#11 signs there, and this machine sees signatures. It knows no CA and no store.

A key is named by a URI (RFC 7512). Its classes are those of `cryptography`, so whatever signs with a key signs with
these. python-pkcs11 is loaded when the first of them is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import NoDigestInfo, Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_private_key

from pki.authority import CaKey, CaPublicKey, key_pem
from pki.files import UnusableSecret, read_secret
from pki.key_uri import SCHEME, KeyUri, MalformedKeyUri, parse_uri
from pki.profile import NO_CA_KEY

if TYPE_CHECKING:
    from pkcs11 import ObjectClass, Session, Token
    from pkcs11._pkcs11 import lib

EXTRA = "outgate[pkcs11]"
MAX_PIN = 256  # bytes
NO_KEY = "no such private key in the token; make it there, or correct its name"

_PROOF = b"outgate: whose key is this?"

# A module is loaded once in a process, and python-pkcs11 does not ask it to take locks of its own (C_Initialize
# without arguments, PKCS#11 2.40 5.4). One for all modules: a token is slower than the wait for another one.
_one_at_a_time = Lock()
_lives: defaultdict[Path, int] = defaultdict(int)  # of each module: how often it was ended, and every session with it


class SignerError(Exception):
    """A key in a token cannot be used. `str()` has its URI and the repair, and no PIN."""


class NoCaKey(ValueError):
    """A key of a kind that no CA has."""


def open_key(uri: str, public_key: CaPublicKey | None = None) -> CaKey:
    """The key that `uri` names.

    public_key  what must be there; then the token is opened when the key first signs. None: it is read there now

    Raises SignerError.
    """
    try:
        place = _Place(parse_uri(uri))
    except MalformedKeyUri as error:
        raise SignerError(str(error)) from error
    found = public_key or place.public_key()
    if isinstance(found, ec.EllipticCurvePublicKey):
        return RemoteEcKey(uri, place, found)
    if isinstance(found, rsa.RSAPublicKey):
        return RemoteRsaKey(uri, place, found)
    raise SignerError(f"{place.uri}: {NO_CA_KEY}")


def key_text(key: CaKey) -> bytes:
    """A key as it stands in a file: PEM, or the line that says where it is, with the PIN if that has one."""
    return f"{key.uri}\n".encode() if isinstance(key, RemoteKey) else key_pem(key)


def key_of(text: bytes, public_key: CaPublicKey) -> CaKey:
    """What `key_text` wrote. A key in a token is held against `public_key` when it signs; any other is as it stands.

    Raises SignerError; NoCaKey, or another ValueError; TypeError where it is encrypted.
    """
    if text.startswith(SCHEME.encode()):
        return open_key(text.decode().strip(), public_key)
    # Whether an RSA key's primes are prime takes 70 ms to see; a store sees instead that the key signs.
    key = load_pem_private_key(text, None, unsafe_skip_rsa_key_validation=True)
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise NoCaKey(NO_CA_KEY)
    return key


class RemoteKey:
    """What keys in tokens have in common. `uri` is the whole one: it may have a PIN, and goes where keys go."""

    def __init__(self, uri: str, place: _Place) -> None:
        self.uri = uri
        self._place = place

    def prove(self) -> None:
        """Signs once. Raises SignerError: the token cannot be used, or has another key by this name."""
        raise NotImplementedError

    def private_numbers(self) -> NoReturn:
        self._refuse()

    def private_bytes(self, *_: object, **__: object) -> NoReturn:
        self._refuse()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._place.uri}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise SignerError(f"{self._place.uri}: the key stays in its token; it can sign, and nothing else")


class RemoteEcKey(RemoteKey, ec.EllipticCurvePrivateKey):
    """An elliptic curve key in a token."""

    def __init__(self, uri: str, place: _Place, public_key: ec.EllipticCurvePublicKey) -> None:
        super().__init__(uri, place)
        self._public_key = public_key

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public_key

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public_key.curve

    @property
    def key_size(self) -> int:
        return self._public_key.key_size

    def sign(
        self, data: bytes | bytearray | memoryview, signature_algorithm: ec.EllipticCurveSignatureAlgorithm
    ) -> bytes:
        """Raises SignerError."""
        algorithm = signature_algorithm.algorithm
        digest = bytes(data) if isinstance(algorithm, Prehashed) else _digest(data, algorithm)
        raw = self._place.sign(digest, "ECDSA")  # r and s side by side (PKCS#11 2.40 2.3.1); X.509 has them in DER
        half = len(raw) // 2
        signature = encode_dss_signature(int.from_bytes(raw[:half]), int.from_bytes(raw[half:]))
        self._place.require(lambda: self._public_key.verify(signature, data, signature_algorithm))
        return signature

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> NoReturn:
        self._refuse()

    def prove(self) -> None:
        self.sign(_PROOF, ec.ECDSA(hashes.SHA256()))


class RemoteRsaKey(RemoteKey, rsa.RSAPrivateKey):
    """An RSA key in a token."""

    def __init__(self, uri: str, place: _Place, public_key: rsa.RSAPublicKey) -> None:
        super().__init__(uri, place)
        self._public_key = public_key

    def public_key(self) -> rsa.RSAPublicKey:
        return self._public_key

    @property
    def key_size(self) -> int:
        return self._public_key.key_size

    def sign(
        self,
        data: bytes,
        padding: padding.AsymmetricPadding,
        algorithm: Prehashed | hashes.HashAlgorithm | NoDigestInfo,
    ) -> bytes:
        """Raises SignerError; UnsupportedAlgorithm for what no certificate is signed with."""
        name = _RSA_HASHES.get(type(algorithm))
        if name is None or not isinstance(algorithm, hashes.HashAlgorithm):
            raise UnsupportedAlgorithm("a token signs over SHA-256, SHA-384 or SHA-512")
        signature = self._place.sign(data, *_rsa_mechanism(padding, algorithm, name, self._public_key))
        self._place.require(lambda: self._public_key.verify(signature, data, padding, algorithm))
        return signature

    def decrypt(self, ciphertext: bytes, padding: padding.AsymmetricPadding) -> NoReturn:
        self._refuse()

    def prove(self) -> None:
        self.sign(_PROOF, padding.PKCS1v15(), hashes.SHA256())


_RSA_HASHES: dict[type, str] = {hashes.SHA256: "SHA256", hashes.SHA384: "SHA384", hashes.SHA512: "SHA512"}


def _rsa_mechanism(
    how: padding.AsymmetricPadding, algorithm: hashes.HashAlgorithm, name: str, key: rsa.RSAPublicKey
) -> tuple[str, tuple[str, int] | None]:
    """The mechanism's name, and for PSS the name of the hash and the length of the salt."""
    if isinstance(how, padding.PKCS1v15):
        return f"{name}_RSA_PKCS", None
    if isinstance(how, padding.PSS):
        length = how._salt_length  # no other way to it
        if length is padding.PSS.MAX_LENGTH:
            length = padding.calculate_max_pss_salt_length(key, algorithm)
        elif length is padding.PSS.DIGEST_LENGTH:
            length = algorithm.digest_size
        if isinstance(length, int):
            return f"{name}_RSA_PKCS_PSS", (name, length)
    raise UnsupportedAlgorithm("a token signs with PKCS#1 v1.5, or PSS with a known length of salt")


class _Place:
    """One key in one token, and the session in which it signs: opened when first needed, and once more when lost."""

    def __init__(self, uri: KeyUri) -> None:
        self.uri = uri
        self._library: lib | None = None
        self._session: Session | None = None
        self._key: Any = None  # Any: python-pkcs11 gives its keys `sign` at run time
        self._life = 0  # of the library when the session was opened
        self._refused: SignerError | None = None

    def sign(self, data: bytes, mechanism: str, pss: tuple[str, int] | None = None) -> bytes:
        """Raises SignerError."""

        def sign() -> bytes:
            from pkcs11 import MGF, Mechanism

            parameters = (Mechanism[pss[0]], MGF[pss[0]], pss[1]) if pss else None
            return bytes(self._key.sign(data, mechanism=Mechanism[mechanism], mechanism_param=parameters))

        return self._in_session(sign)

    def public_key(self) -> CaPublicKey:
        """What the token says of the key. Raises SignerError."""
        found = self._in_session(self._read_public_key)
        try:
            return cast(CaPublicKey, load_der_public_key(found))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise SignerError(f"{self.uri}: the token shows no public key that can be read") from error

    def require(self, verify: Callable[[], None]) -> None:
        """That a signature is the key's: two tokens may bear one name, or one be faulty. Raises SignerError."""
        try:
            verify()
        except InvalidSignature as error:
            raise SignerError(f"{self.uri}: what signs there is not the key of the certificate") from error

    def _in_session[T](self, use: Callable[[], T]) -> T:
        with _one_at_a_time:
            if self._refused:
                raise self._refused
            try:
                from pkcs11.exceptions import PKCS11Error
            except ImportError as error:
                raise SignerError(f"{self.uri}: keys in tokens need python-pkcs11; install {EXTRA}") from error
            if self._key is not None and self._life == _lives[self.uri.module]:
                try:
                    return use()
                except PKCS11Error:  # the token was away, or somebody logged out
                    self._close()
            try:
                self._open()
                return use()
            except PKCS11Error as error:
                failure = self._failure(error)
                self._close()
                self._end_library()
                raise failure from error
            except SignerError:
                self._close()
                raise

    def _open(self) -> None:
        token = self._find_token()
        self._life = _lives[self.uri.module]
        # Without the PIN first: who is logged in to a token is so in every session of the process, and must not again.
        self._session = token.open()
        self._key = self._find_key(self._session)
        if self._key is None and (pin := self._pin()) is not None:
            self._require_tries(token)
            self._close()
            self._session = token.open(user_pin=pin)
            self._key = self._find_key(self._session)
        if self._key is None:
            unseen = "" if self.uri.has_pin else "; or give pin-source, where it is not seen without a PIN"
            raise SignerError(f"{self.uri}: {NO_KEY}{unseen}")

    def _find_token(self) -> Token:
        import pkcs11
        from pkcs11.exceptions import PKCS11Error

        try:
            self._library = pkcs11.lib(str(self.uri.module))
        except PKCS11Error as error:
            if not str(error):  # the library is there, and would not start
                raise
            raise SignerError(f"{self.uri}: module-path: {error}; name the PKCS#11 library of the token") from error
        return self._library.get_token(token_label=self.uri.token, token_serial=self.uri.serial)

    def _find_key(self, session: Session) -> Any:
        from pkcs11 import ObjectClass

        found = self._objects(session, ObjectClass.PRIVATE_KEY)
        if len(found) > 1:
            raise SignerError(f"{self.uri}: {len(found)} such private keys in the token; name one by its id")
        return found[0] if found else None

    def _objects(self, session: Session, kind: ObjectClass) -> list[Any]:
        from pkcs11 import Attribute

        wanted = {Attribute.CLASS: kind, Attribute.LABEL: self.uri.label, Attribute.ID: self.uri.id}
        return list(session.get_objects({name: value for name, value in wanted.items() if value is not None}))

    def _read_public_key(self) -> bytes:
        from pkcs11 import KeyType, ObjectClass
        from pkcs11.util.ec import encode_ec_public_key
        from pkcs11.util.rsa import encode_rsa_public_key

        assert self._session is not None
        found = self._objects(self._session, ObjectClass.PUBLIC_KEY)
        if len(found) != 1:
            raise SignerError(f"{self.uri}: {len(found)} public keys of that name in the token; one must be beside it")
        encode = encode_rsa_public_key if self._key.key_type is KeyType.RSA else encode_ec_public_key
        try:
            return encode(found[0])
        except (ValueError, TypeError) as error:  # of its own reader of ASN.1
            raise SignerError(f"{self.uri}: the token shows no public key that can be read") from error

    def _pin(self) -> str | None:
        if self.uri.pin_source is None:
            return self.uri.pin
        try:
            pin = read_secret(self.uri.pin_source, MAX_PIN, shows="the PIN", holds="the PIN").rstrip(b"\r\n").decode()
        except UnusableSecret as error:
            raise SignerError(str(error)) from error
        except UnicodeDecodeError:
            pin = ""
        if not pin or not pin.isprintable() or len(pin) > MAX_PIN:
            raise SignerError(f"{self.uri.pin_source}: not one line that is a PIN")
        return pin

    def _require_tries(self, token: Token) -> None:
        """A token locks itself after some wrong PINs, and a gate would try at each leaf and each restart."""
        from pkcs11 import TokenFlag

        if token.flags & TokenFlag.USER_PIN_LOCKED:
            raise SignerError(f"{self.uri}: the token has locked the PIN; unlock it as its security officer")
        if token.flags & TokenFlag.USER_PIN_FINAL_TRY:
            raise SignerError(f"{self.uri}: one more wrong PIN locks the token; log in by hand once, then try again")

    def _failure(self, error: Exception) -> SignerError:
        from pkcs11 import exceptions as of

        kind = type(error).__name__
        match error:
            case of.NoSuchToken():
                why = "no such token; connect it, or correct its name"
            case of.MultipleTokensReturned():
                why = "more than one such token; add its serial"
            case of.UserAlreadyLoggedIn():  # by a key of ours in the same token: this one was looked for in vain
                why = NO_KEY
            case of.PinIncorrect() | of.PinInvalid() | of.PinLenRange() | of.PinExpired() | of.PinLocked():
                self._refused = SignerError(f"{self.uri}: the token refuses the PIN ({kind}); correct it")
                return self._refused
            case _:
                why = f"{kind}{f': {error}' if str(error) else ''}; see to the token"
        return SignerError(f"{self.uri}: {why}")

    def _close(self) -> None:
        from pkcs11.exceptions import PKCS11Error

        session, self._session, self._key = self._session, None, None
        if session is not None and self._life == _lives[self.uri.module]:  # else its handle is another session's
            with suppress(PKCS11Error):  # it is lost, or goes with the process
                session.close()

    def _end_library(self) -> None:
        """The next use starts it anew: some find a token that was away only then."""
        from pkcs11.exceptions import PKCS11Error

        if self._library is not None:
            _lives[self.uri.module] += 1  # the sessions of every key there have ended; each opens its own again
            with suppress(PKCS11Error):
                self._library.finalize()


def _digest(data: bytes | bytearray | memoryview, algorithm: hashes.HashAlgorithm) -> bytes:
    digest = hashes.Hash(algorithm)
    digest.update(data)
    return digest.finalize()
