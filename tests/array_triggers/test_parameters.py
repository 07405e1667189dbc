"""Parameters of triggers on arrays are uniform words of the stream of a key."""

from keyed_xai.array_triggers.parameters import Ranges
from keyed_xai.keys import ByteStream


def test_parameters_are_uniform_words_of_the_stream():
    ranges = Ranges([(0.5, 0.0, 1.0), (3.0, 2.0, 6.0)])
    words = ByteStream(b"seed").uint32(3)
    stream = ByteStream(b"seed")
    assert ranges.derive(stream).tolist() == [words[0] / 2**32, 2 + 4 * words[1] / 2**32]
    assert stream.uint32(1)[0] == words[2]
