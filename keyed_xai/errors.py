"""Errors that keyed-xai raises on purpose. Each message says what was expected, what came, and what to do next."""


class KeyedXAIError(Exception):
    """Base of every error that a user can put right."""


class KeyFormatError(KeyedXAIError):
    """A key file is missing, malformed, of the wrong kind, or its passphrase does not fit."""


class ModelError(KeyedXAIError):
    """A model file cannot be read, recognised or explained."""


class DataError(KeyedXAIError):
    """A data set or an image cannot be read, or has an unexpected layout."""


class ArtifactError(KeyedXAIError):
    """A card, licence, grant or report is malformed, tampered with, or does not fit its schema."""


class TrainingError(KeyedXAIError):
    """Training cannot start, continue or resume with the settings given."""
