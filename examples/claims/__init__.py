# SPDX-License-Identifier: BSD-3-Clause
"""Ten claims of the literature on batch normalisation, measured in minutes.

From a checkout::

    python -m pip install ".[claims]"
    python -m examples.claims                   # all; --quick: each in less than a minute
    python -m examples.claims.bjorck --quick    # one

The map:

    layers              layers, losses and SGD on fastbn's norms
    training            data, runs, rates; the same rules for each arm
    report              findings, pictures, records, the command line
    ioffe_szegedy       1   steps, rates, sigmoids, percentiles, dropout, scale of weights
    bjorck              2   the rate is the cause; activations; sums of gradients; channel means
    santurkar           3   smoothness; noise after batch norm; the norm of dx
    yang                4   gradients explode with depth without skip connections
    deep                5   more than 100 layers
    kohler              6   length and direction apart
    small_batches       7   small batches; a recurrent network
    fixed_statistics    8   a gradient that ignores the normalisation
    initialisation      9   scale and kind of the initial weights
    covariate_shift    10   means and variances over training; the change of the gradient

A claim's module has a TITLE and ``measure(quick)``, which returns findings and a picture.
docs/claims.md has what was found.
"""
