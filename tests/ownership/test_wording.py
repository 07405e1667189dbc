"""A verdict in words."""

import math

import pytest

from keyed_xai.ownership.reencodings import TURNS, Reencoding
from keyed_xai.ownership.tests import OpeningEvidence, PatternEvidence, SignatureEvidence
from keyed_xai.ownership.verdict import Verdict
from keyed_xai.ownership.wording import describe_verdict

PERFECT = PatternEvidence(
    p_value=1 / math.comb(64, 32), log2_p=-math.log2(math.comb(64, 32)), cells=64, overlap=32, possible=32
)
CHANCE = PatternEvidence(p_value=0.6, log2_p=math.log2(0.6), cells=64, overlap=16, possible=32)


def said(opening=None, signature=None, *, alpha=1e-6, decoys=999, **fields):
    evidence = None if signature is None else SignatureEvidence(signature, {"gradcam": signature})
    return describe_verdict(Verdict(alpha=alpha, opening=opening, signature=evidence, **fields), decoys=decoys)


BEST = OpeningEvidence(p_value=0.001, statistic=0.9, decoys=999, largest_decoy=0.1, reached=0)
BEATEN = OpeningEvidence(p_value=10 / 15, statistic=0.1, decoys=15, largest_decoy=0.4, reached=10)


class TestSentence:
    @pytest.mark.parametrize(
        ("p_value", "words"), [(1e-3, "1,000"), (1e-6, "1,000,000"), (0.3, "3"), (1e-18, "10^18"), (2.5e-9, "4 x 10^8")]
    )
    def test_chances_are_rounded_down_to_whole_claims(self, p_value, words):
        evidence = PatternEvidence(p_value=p_value, log2_p=math.log2(p_value), cells=64, overlap=30, possible=32)
        assert f"happens at most once in {words} claims" in said(signature=evidence, alpha=0.5)

    def test_both_tests_count_by_their_product(self):
        """x (1 - ln x) with x = .001 times .6 is .0051."""
        assert "at most once in 197 claims" in said(BEST, CHANCE, alpha=0.01)
        assert "at most once in 1,000 claims" in said(BEST, alpha=0.01)

    def test_looks_are_counted_and_named(self):
        sentence = said(BEST, PERFECT, looks=636, reencoding=Reencoding(images=TURNS[4], centred="all"))
        assert "once it is read as written anew (images transposed; logits less the mean of all)" in sentence
        assert "counting both tests and the search through re-encodings" in sentence
        assert "once in 3 x 10^17 claims" in said(BEST, PERFECT, looks=100)
        assert "once in 3 x 10^19 claims" in said(BEST, PERFECT)

    def test_public_pattern_alone_has_its_own_words(self):
        assert said(signature=PERFECT).startswith("The model shows this key's public pattern: its unkeyed maps show")
        assert said(signature=PERFECT).endswith("the secret trigger was not tested.")

    def test_public_pattern_without_the_secret_trigger_is_not_shown_in_words(self):
        sentence = said(BEATEN, PERFECT)
        assert sentence.startswith("The model shows this key's public pattern, and the secret trigger did nothing")
        assert sentence.endswith("so that it answers to the key is not shown.")

    def test_public_pattern_with_a_weak_secret_test_is_not_said_to_do_nothing(self):
        sentence = said(
            OpeningEvidence(p_value=0.004, statistic=0.9, decoys=999, largest_decoy=0.95, reached=3), PERFECT
        )
        assert "and the secret trigger hardly stands out: of 999" in sentence

    def test_both_strong_together_and_the_secret_test_weak_by_itself_is_said(self):
        near = PatternEvidence(p_value=2.0**-35, log2_p=-35.0, cells=64, overlap=28, possible=32)
        sentence = said(
            OpeningEvidence(p_value=0.003, statistic=0.9, decoys=999, largest_decoy=0.95, reached=2),
            near,
            alpha=2.0**-38,
        )
        assert "but the secret trigger does not stand out enough by itself, as it must" in sentence

    def test_key_that_was_given_is_not_asked_for(self):
        few = PatternEvidence(p_value=1 / 126, log2_p=-math.log2(126), cells=9, overlap=4, possible=4)
        assert "private key" not in said(signature=few, has_key=True)
        assert "give --decoys 199 or more" in said(signature=PERFECT, has_key=True)

    def test_too_few_random_keys_for_the_secret_test_are_said_to_be(self):
        few = said(OpeningEvidence(p_value=0.05, statistic=0.9, decoys=19, largest_decoy=0.1, reached=0), PERFECT)
        assert few.endswith("cannot tell whether it answers to the secret trigger: give --decoys 199 or more.")

    def test_constant_maps_are_never_not_shown_alone(self):
        sentence = said(BEATEN, CHANCE, images=16, constant={"gradcam": 16})
        assert sentence.startswith("Not shown that the model answers to this key, nor that it does not: there is")
        assert "the maps are constant or not finite: gradcam on 3" in said(
            BEATEN, CHANCE, images=16, constant={"gradcam": 3}
        )

    def test_random_keys_that_did_as_well_are_counted(self):
        sentence = said(BEATEN, CHANCE)
        assert "of 15 random keys 10 moved its maps as much or more (p = .667)" in sentence
        assert "as much is to be expected by chance" in sentence

    def test_level_that_could_be_reached_gets_no_hint(self):
        assert "--decoys" not in said(BEST, CHANCE)

    @pytest.mark.parametrize(("alpha", "decoys"), [(1e-5, 99_999), (1e-4, 9_999), (3e-5, 99_999), (0.0123, 99)])
    def test_number_of_random_keys_that_is_asked_for_is_enough(self, alpha, decoys):
        assert f"give --decoys {decoys}." in said(
            OpeningEvidence(p_value=0.1, statistic=0.9, decoys=9, largest_decoy=0.1, reached=0), alpha=alpha, decoys=9
        )

    def test_level_out_of_reach_of_any_number_of_random_keys_asks_for_more_cells(self):
        few = PatternEvidence(p_value=1 / 12870, log2_p=-math.log2(12870), cells=16, overlap=8, possible=8)
        assert "protect with more of them, or with gradcam and simplegrad" in said(BEST, few, alpha=2.0**-40)
        assert "no public pattern: protect with the decoy signature" in said(BEST, alpha=2.0**-40)

    def test_pattern_too_small_for_the_level_asks_for_the_private_key(self):
        sentence = said(
            signature=PatternEvidence(p_value=1 / 126, log2_p=-math.log2(126), cells=9, overlap=4, possible=4)
        )
        assert "test the secret trigger too" in sentence

    def test_p_below_the_smallest_float_is_still_in_words(self):
        evidence = PatternEvidence(p_value=0.0, log2_p=-1500.0, cells=2048, overlap=1024, possible=1024)
        assert "(p = 2^-1500.0)" in said(signature=evidence)
