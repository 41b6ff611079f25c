"""Text from tokens as they come: whole characters, and nothing of what shall stop it."""

from collections.abc import Sequence

from gptjax.data.tokenizer import Tokenizer

TORN = '\ufffd'  # what a tokenizer makes of bytes that are no character, or not yet
MOST_TORN = 3  # at the end of a text that is cut in a character, which has four bytes at most


class Spoken:
  """A continuation of one prompt."""

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
    """Ends at an end-of-text, or before the first of these strings."""
    self._tokenizer, self._stops = tokenizer, stops
    self._waiting: list[int] = []  # tokens of which the last may be part of a character
    self._settled = 0  # characters of theirs that were passed on
    self._held = ''  # text that may be the beginning of a stop
    self.tokens: list[int] = []
    self.text = ''
    self.ended = ''  # why: '' while it goes on

  def add(self, token: int) -> str:
    """What can be said since this token came."""
    if self.ended:
      return ''
    if token == self._tokenizer.end_of_text:
      return self.end('end of text')
    self.tokens.append(token)
    self._waiting.append(token)
    text = self._tokenizer.decode(self._waiting)
    torn = min(MOST_TORN, len(text) - len(text.rstrip(TORN)))
    new = text[self._settled : len(text) - torn]
    self._settled += len(new)
    if not torn:
      self._waiting, self._settled = [], 0
    return self._say(self._held + new)

  def end(self, why: str) -> str:
    """What is left to say when it ends for another reason than a stop."""
    if self.ended:
      return ''
    said = self._say(self._held + self._tokenizer.decode(self._waiting)[self._settled :])
    if not self.ended:
      self.ended, rest, self._held = why, self._held, ''
      self.text += rest
      said += rest
    return said

  def _say(self, text):
    found = [at for at in map(text.find, self._stops) if at >= 0]
    if found:
      text, self.ended, self._held = text[: min(found)], 'stop', ''
    else:
      kept = max((_overlap(text, stop) for stop in self._stops), default=0)
      self._held, text = text[len(text) - kept :], text[: len(text) - kept]
    self.text += text
    return text


def _overlap(text: str, stop: str) -> int:
  """Of how many characters the longest end of a text is with which a stop begins."""
  lengths = range(min(len(text), len(stop) - 1), 0, -1)
  return next((n for n in lengths if text.endswith(stop[:n])), 0)
