"""Maps a sample index to a window of the corpus, without state and in O(1) memory.

Within an epoch every window is drawn once, in the order of a keyed pseudo-random permutation (a
Feistel network with cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002). Each epoch has a different order, and shifts all windows by a different phase.
"""

from mc_ds.config.errors import ConfigError

_MASK = (1 << 64) - 1
_ROUNDS = 6


def _mix(value: int) -> int:
    """Mix a 64-bit integer bijectively; all output bits depend on all input bits (SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """Hash integers to a 64-bit key; their order matters."""
    key = 0
    for part in parts:
        key = _mix(key ^ _mix(part & _MASK))
    return key


def permute(index: int, size: int, key: int) -> int:
    """Return the image of `index` under the permutation of range(size) given by `key`."""
    assert 0 <= index < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    # The network permutes 4^half_bits >= size values. Applying it until the result is below size
    # takes at most 4 rounds on average.
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (_mix(key ^ _mix(right + (round_number << 32))) & half_mask)
        index = left << half_bits | right
        if index < size:
            return index


class WindowSampler:
    """Draws windows of `window` tokens, one every `stride` tokens, from a corpus of `token_count`.

    With window = T + 1 and stride = T each token is a label once per epoch. All windows of an epoch
    are shifted by a phase in [0, stride). Raises ConfigError if the corpus is shorter than one
    window.
    """

    def __init__(self, token_count: int, *, window: int, stride: int, seed: int) -> None:
        if token_count < window:
            raise ConfigError(
                f"the corpus has {token_count} tokens, a sample needs {window}: use more text or"
                f" mc.seq_len <= {token_count - 1}"
            )
        self._stride = stride
        self._seed = seed
        self.windows_per_epoch = max(1, (token_count - window - stride + 1) // stride + 1)
        """Equal in all epochs, so that index // windows_per_epoch is the epoch."""
        slack = token_count - window - (self.windows_per_epoch - 1) * stride
        self._phases = min(stride, slack + 1)

    def start(self, index: int) -> int:
        """Return the first token of sample `index` >= 0: a pure function of (seed, index)."""
        epoch, position = divmod(index, self.windows_per_epoch)
        key = derive_key(self._seed, epoch)
        phase = derive_key(key, 1) % self._phases
        return phase + permute(position, self.windows_per_epoch, key) * self._stride
