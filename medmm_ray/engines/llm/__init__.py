"""Language models behind an API: the client and its budget, the store of answers, one module for each kind of API."""
