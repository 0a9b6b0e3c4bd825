# SPDX-License-Identifier: Apache-2.0
"""Reads a schedule of guidance from its text."""

from __future__ import annotations

import re
from decimal import Decimal
from difflib import get_close_matches

from fastdistill.diffusion.guidance import FORMS, By, Guidance, Linear, Piecewise
from fastdistill.diffusion.hooks import Cads, PowerLaw
from fastdistill.errors import InputError

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?")
_NAMES = ("linear", "power", "cads")


def parsed(text: str) -> Guidance:
    """The schedule of a text (``Guidance.parse``).

    Raises:
        InputError: no schedule; the message has the column of the first wrong character.
    """
    return _Text(text).schedule()


class _Text:
    """A text and how far it has been read, from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def schedule(self) -> Guidance:
        self._skip("")
        name = re.compile(r"([A-Za-z_]+)\s*(:?)").match(self.text, self.at)
        if name is None:
            return self._piecewise()
        kind = name[1].lower()
        if kind not in _NAMES or not name[2]:
            near = get_close_matches(kind, _NAMES, 1)
            found = f"; did you mean {near[0]}:?" if near else ""
            raise self.error(f"a number, linear:w0+omega, power:omega^alpha or cads:tau1..tau2,scale,mix:{found}")
        self.at = name.end()
        return {"linear": self._linear, "power": self._power, "cads": self._cads}[kind]()

    def _linear(self) -> Guidance:
        w0 = self._number()
        if self.text[self.at : self.at + 1] not in ("+", "-"):
            raise self.error("+ or - and omega")
        omega = self._number()
        self._end("the end")
        return Linear(float(w0), float(omega))

    def _power(self) -> Guidance:
        omega = self._number()
        self._pass("^", "^ and alpha")
        alpha = self._number()
        self._end("the end")
        return PowerLaw(float(omega), float(alpha))

    def _cads(self) -> Guidance:
        values = [float(self._number())]
        for mark, wanted in (("..", ".. and tau2"), (",", ", and the scale"), (",", ", and mix")):
            self._pass(mark, wanted)
            values.append(float(self._number()))
        self._pass(":", ": and a schedule")
        start = self.at
        base = self.schedule()
        if isinstance(base, Cads):
            self.at = start
            raise self.error("a schedule without cads")
        return Cads(base, *values)

    def _piecewise(self) -> Guidance:
        stretches: list[tuple[float, float]] = []
        units: set[By] = set()
        while True:
            w = self._number()
            if not self._skip("@"):
                break
            start = self.at
            threshold = self._number()
            units.add("t" if self._skip("t") else "step" if self._skip("%") else "sigma")
            if len(units) > 1:
                self.at = start
                raise self.error("thresholds that are all sigma, all t or all %")
            stretches.append((float(threshold.scaleb(-2) if units == {"step"} else threshold), float(w)))
            self._pass(",", ", and the weight after the last threshold")
        self._end("@ and a threshold" if self.text.startswith(",", self.at) else "@ or the end")
        return Piecewise(tuple(stretches), float(w), units.pop() if units else "sigma")

    def _number(self) -> Decimal:
        self._skip("")
        found = _NUMBER.match(self.text, self.at)
        if found is None:
            raise self.error("a number")
        self.at = found.end()
        self._skip("")
        return Decimal(found[0])

    def _end(self, wanted: str) -> None:
        if self.at < len(self.text):
            raise self.error(wanted)

    def _pass(self, token: str, wanted: str) -> None:
        if not self._skip(token):
            raise self.error(wanted)

    def _skip(self, token: str) -> bool:
        """Passes spaces and, if it comes next, the token."""
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        found = self.text.startswith(token, self.at)
        self.at += len(token) * found
        return found

    def error(self, wanted: str) -> InputError:
        got = f"{self.text!r}, where column {self.at + 1} should be {wanted}"
        return InputError.of("guidance", f"a schedule such as {FORMS}", got)
