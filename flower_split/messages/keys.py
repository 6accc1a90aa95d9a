"""Names of records and keys in Flower's messages; imported by this package alone.

Everything that this package adds to a ConfigRecord of Flower's stands under one prefix, so that it
meets no key of a strategy's or a mod's.
"""

# Of everything under the prefix. A key that a reader may leave out needs no new number; one that changes
# its meaning raises FORMAT_NUMBER, and OLDEST_READER to the format that a reader must know.
FORMAT_NUMBER = 1
OLDEST_READER = 1
OLDEST_READ = 1  # the oldest format that this version reads
PREFIX = "flower-split."

# Records. Flower's strategies use these names by default.
ARRAYS = "arrays"
METRICS = "metrics"
CONFIG = "config"

# Records of our own.
BASE_CHANGE = PREFIX + "base-change"  # ArrayRecord of an order: beside the frozen base weights
BASE_VALUES = PREFIX + "base-values"  # ArrayRecord of a reply: initial values of the adapter
REPLY = PREFIX + "reply"  # ConfigRecord of a reply

# In every ConfigRecord of ours.
FORMAT = PREFIX + "format"
READER = PREFIX + "format-of-reader"  # the oldest that understands the record
VERSION = PREFIX + "version"

# Of a query.
PURPOSE = PREFIX + "purpose"
NAMES = PREFIX + "names"

# Of an order.
TRUNK_ADDRESS = PREFIX + "trunk-address"
TRUNK_TOKEN = PREFIX + "trunk-token"
TRUNK_CERTIFICATES = PREFIX + "trunk-root-certificates"
SERVER_ROUND = PREFIX + "server-round"
ATTEMPT = PREFIX + "attempt"
EXPERIMENT = PREFIX + "experiment"
DATA_PASS = PREFIX + "data-pass"
TRAINABLE = PREFIX + "trainable"
WANTS_WEIGHT_NORMS = PREFIX + "wants-weight-norms"
PRIVATE_NAMES = PREFIX + "private-names"
PRIVATE_DIGEST = PREFIX + "private-digest"  # also of a training reply
PRIVATE_FOLDER = PREFIX + "private-folder"
RATE_FACTOR = PREFIX + "rate-factor"
KEEPS_OPTIMIZER = PREFIX + "keeps-optimizer"
KEEPS_PERSONAL = PREFIX + "keeps-personal"
PROXIMAL_MU = "proximal-mu"  # Flower's own: its FedProx writes it

# Of a training reply: one key for each list, and for each module.
STEPS = PREFIX + "steps."
WEIGHT_NORMS = PREFIX + "weight-norms."

# Metrics of replies: Flower's strategies weigh and average clients by these names.
TRAIN_LOSS = "train_loss"
EVAL_LOSS = "eval_loss"
LOSS_SUM = "loss-sum"
PERSONAL = "personal-"  # begins the names of sums of a client's own model
NUM_TOKENS = "num-tokens"
NUM_EXAMPLES = "num-examples"
BYTES_SENT = "bytes-sent"
BYTES_RECEIVED = "bytes-received"
UNIFORM_WEIGHT = "uniform-weight"
