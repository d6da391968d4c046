# Everyday commands; `just` lists them.

default:
    @just --list

# Format, lint, document: all warnings are errors
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --release -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --release

# The whole test suite (needs nothing but Rust)
test:
    cargo test --release --workspace

# The tests on real weights (fetches SmolLM2-135M-Instruct first)
test-model:
    scripts/get-model
    cargo test --release -p quire-engine --features fetched-model --test smollm2

# The headline figure, under a minute
quick:
    cargo run --release --bin experiment -- configs/fig3.toml --quick

# The headline figure, about five minutes (README's is `just figure fig3 --full`)
fig3:
    cargo run --release --bin experiment -- configs/fig3.toml

# Any figure: `just figure fig10`, `just figure fig1 --quick`
figure NAME *ARGS:
    cargo run --release --bin experiment -- configs/{{NAME}}.toml {{ARGS}}

# All figures of configs/ on this machine, one after another; says where they lie and which failed
figures *ARGS:
    scripts/figures {{ARGS}}

# The paper, paper/quire.pdf, from the committed results (`just paper --pages` for pictures of its pages)
paper *ARGS:
    scripts/paper {{ARGS}}

# What a branch made worse, against another revision: `just suite main`, `just suite main --only base`
suite BASE *ARGS:
    cargo run --release --bin experiment -- suite ci --base {{BASE}} {{ARGS}}

# Kernel benchmarks with their share of the machine's ceiling
bench *ARGS:
    cargo bench -p quire-kernels {{ARGS}}

# Side by side with llama.cpp (see baselines/llamacpp/README.md)
llamacpp MODEL:
    baselines/llamacpp/compare.sh {{MODEL}}

# Fuzz one target for a while (needs a nightly toolchain and cargo-fuzz)
fuzz TARGET SECONDS="60":
    cargo +nightly fuzz run {{TARGET}} -- -max_total_time={{SECONDS}}

# What continuous integration runs
ci:
    bash .ci/run
