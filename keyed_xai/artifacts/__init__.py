"""The only reader and writer of cards, licences, reports and model folders.

Import from its modules:

* `documents`: JSON against the schemas, and writing files whole or not at all.
* `card`: how to run a protected model. Public.
* `license`: the signed statement of who owns it.
* `folder`: a protected model on disk, read and checked.
* `inspection`: what is in an artifact, and all that is wrong with it.
* `writer`: a protected model, written; the only one that imports torch.
"""
