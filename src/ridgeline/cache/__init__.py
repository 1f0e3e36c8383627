"""Which page holds which tokens: ids only, the layout inside a page is the executor's."""
