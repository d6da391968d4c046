//! Sampling: draws and log-probabilities against the float64 distribution, the greedy choice by hand.

use quire_kernels::cpu::Isa;
use quire_kernels::reference;
use quire_kernels::sampling::{Choice, Sampler, SamplingRule};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::seeds;

/// Rows sampled at a time.
const ROWS: usize = 250;
/// Draws of each rule.
const DRAWS: usize = 20_000;

/// Those, or the fewer that `QUIRE_SAMPLE_DRAWS` says, where every launch takes long: under compute-sanitizer.
fn draws() -> usize {
    let asked = std::env::var("QUIRE_SAMPLE_DRAWS").ok();
    asked.map_or(DRAWS, |draws| draws.parse().expect("QUIRE_SAMPLE_DRAWS is a number")).max(ROWS)
}

/// One row's rule: history, length of the prompt in it, uniform number.
#[derive(Debug, Clone, Copy)]
struct Row<'a> {
    rule: SamplingRule,
    history: &'a [u32],
    prompt_len: usize,
    uniform: f64,
}

/// Samples `rows` rows that all have these logits.
type SampleRows<'a> = &'a mut dyn FnMut(&[f32], &[Row<'_>]) -> Vec<Choice>;

fn on_every_device(mut body: impl FnMut(&str, SampleRows<'_>)) {
    for isa in Isa::available() {
        let mut sampler = Sampler::new(isa).expect("available");
        body(&format!("{isa:?}"), &mut |logits, rows| {
            let sample = |row: &Row<'_>| {
                let mut logits = logits.to_vec();
                sampler.sample(&mut logits, &row.rule, row.history, row.prompt_len, row.uniform)
            };
            rows.iter().map(sample).collect()
        });
    }
    #[cfg(feature = "gpu-tests")]
    gpu(&mut body);
}

#[cfg(feature = "gpu-tests")]
fn gpu(body: &mut impl FnMut(&str, SampleRows<'_>)) {
    use quire_kernels::cuda::{DeviceSampler, SampleRequest};
    use quire_kernels::{Backend, HeadShape, KvDtype};
    let device = crate::gpu(
        HeadShape { heads: 4, kv_heads: 2, head_dim: 64 },
        crate::ACTIVATIONS[0],
        KvDtype::Bf16,
        false,
    );
    let backend = &device.backend;
    body(&device.name, &mut |logits, rows| {
        let vocab = logits.len();
        let mut sampler = DeviceSampler::new(backend.device(), rows.len(), vocab).expect("small");
        let mut buffer = backend.logits_buffer(rows.len(), vocab).expect("small");
        backend.set_rows(&mut buffer, rows.len());
        backend.fill(&logits.repeat(rows.len()), &mut buffer).expect("the device works");
        let requests: Vec<SampleRequest<'_>> = rows
            .iter()
            .map(|row| SampleRequest {
                rule: row.rule,
                history: row.history,
                prompt_len: row.prompt_len,
                uniform: row.uniform,
                logprob: true,
                top: 0,
            })
            .collect();
        let found = sampler.sample(backend.device(), &buffer, &requests).expect("the device works");
        found.into_iter().map(|row| row.choice).collect()
    });
}

/// The most probable tokens of rows of logits, as many as are wanted of each.
type TopOfRows<'a> = &'a mut dyn FnMut(&[Vec<f32>], &[usize]) -> Vec<Vec<Choice>>;

fn top_on_every_device(mut body: impl FnMut(&str, TopOfRows<'_>)) {
    for isa in Isa::available() {
        let sampler = Sampler::new(isa).expect("available");
        body(&format!("{isa:?}"), &mut |logits, counts| {
            let top = |(logits, &count): (&Vec<f32>, &usize)| sampler.top(&mut logits.clone(), count);
            logits.iter().zip(counts).map(top).collect()
        });
    }
    #[cfg(feature = "gpu-tests")]
    gpu_top(&mut body);
}

/// On a GPU with every other row drawn, so that both kernels choose beside it; and what the greedy kernel chooses is the first.
#[cfg(feature = "gpu-tests")]
fn gpu_top(body: &mut impl FnMut(&str, TopOfRows<'_>)) {
    use quire_kernels::cuda::{DeviceSampler, SampleRequest};
    use quire_kernels::{Backend, HeadShape, KvDtype};
    let heads = HeadShape { heads: 4, kv_heads: 2, head_dim: 64 };
    let device = crate::gpu(heads, crate::ACTIVATIONS[0], KvDtype::Bf16, false);
    let backend = &device.backend;
    body(&device.name, &mut |logits, counts| {
        let (rows, vocab) = (logits.len(), logits[0].len());
        let mut sampler = DeviceSampler::new(backend.device(), rows, vocab).expect("small");
        let mut buffer = backend.logits_buffer(rows, vocab).expect("small");
        backend.set_rows(&mut buffer, rows);
        backend.fill(&logits.concat(), &mut buffer).expect("the device works");
        let mut sample = |temperature: f32| {
            let request = |(row, &top): (usize, &usize)| {
                let temperature = if row % 2 == 0 { temperature } else { 0.0 };
                let rule = SamplingRule { temperature, ..SamplingRule::default() };
                SampleRequest { rule, history: &[], prompt_len: 0, uniform: 0.3, logprob: true, top }
            };
            let requests: Vec<_> = counts.iter().enumerate().map(request).collect();
            sampler.sample(backend.device(), &buffer, &requests).expect("the device works")
        };
        let greedy = sample(0.0);
        for row in &greedy {
            assert!(row.top.first().is_none_or(|&first| first == row.choice), "{row:?}");
        }
        let drawn = sample(0.7);
        assert!(
            greedy.iter().zip(&drawn).all(|(a, b)| a.top == b.top),
            "a draw changed what is most probable"
        );
        drawn.into_iter().map(|row| row.top).collect()
    });
}

#[test]
fn the_most_probable_are_those_of_a_full_sort() {
    for mut rng in seeds(&[21]) {
        top_on_every_device(|name, top_of| {
            let drawn: [_; 3] = std::array::from_fn(|_| rng.random_range(2..=80_000));
            for vocab in [1, 37, 1000, 5000, 49_152, 128_256, 262_147].into_iter().chain(drawn) {
                the_most_probable_of(vocab, name, top_of, &mut rng);
            }
        });
    }
}

fn the_most_probable_of(vocab: usize, name: &str, top_of: TopOfRows<'_>, rng: &mut StdRng) {
    // Few values, so that many are equal; in one row all are, in one there are none but the last.
    let mut logits: Vec<Vec<f32>> =
        (0..6).map(|_| (0..vocab).map(|_| rng.random_range(-4000..4000) as f32 / 256.0).collect()).collect();
    logits[1].fill(0.5);
    logits[2].fill(f32::NEG_INFINITY);
    logits[3].fill(f32::NAN);
    logits[3][vocab - 1] = -3.0;
    logits[4][vocab / 2] = f32::NAN;
    logits[4][vocab / 3] = f32::NEG_INFINITY;
    let counts = [20, 32, 5, 3, 1, 272];
    let expected: Vec<Vec<(u32, f64)>> = logits
        .iter()
        .zip(counts)
        .map(|(logits, count)| {
            let mut all: Vec<(u32, f64)> = (0..).zip(log_probabilities(logits)).collect();
            all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            all.truncate(count);
            all
        })
        .collect();
    for counts in [counts, [0, 0, 5, 0, 1, 2]] {
        for ((found, expected), count) in top_of(&logits, &counts).iter().zip(&expected).zip(counts) {
            let what = format!("{name}, {vocab} tokens, {count} wanted");
            assert_eq!(found.len(), count.min(vocab), "{what}");
            for (found, &(token, logprob)) in found.iter().zip(expected) {
                assert_eq!(found.token, token, "{what}: {found:?}, expected {logprob}");
                let error = (f64::from(found.logprob) - logprob).abs();
                assert!(
                    f64::from(found.logprob) == logprob || error < 1e-5 * logprob.abs().max(1.0),
                    "{what}: {found:?}, expected {logprob}"
                );
            }
        }
    }
}

/// Penalties count a token that the batch before has just chosen, and that the host does not know, as they count a known one.
#[cfg(feature = "gpu-tests")]
#[test]
fn a_token_counts_before_the_host_knows_it() {
    use quire_kernels::cuda::{DeviceSampler, SampleRequest};
    use quire_kernels::{Backend, FED, HeadShape, KvDtype};
    let heads = HeadShape { heads: 4, kv_heads: 2, head_dim: 64 };
    let device = crate::gpu(heads, crate::ACTIVATIONS[0], KvDtype::Bf16, false);
    let (backend, device) = (&device.backend, device.backend.device());
    // Nearly flat, and the same in every row: what was chosen, and only that, is out of the question afterwards.
    let vocab = 300;
    let logits: Vec<f32> = (0..vocab).map(|i| (i * 7 % 13) as f32 * 0.05).collect();
    let mut buffer = backend.logits_buffer(ROWS, vocab).expect("small");
    backend.set_rows(&mut buffer, ROWS);
    backend.fill(&logits.repeat(ROWS), &mut buffer).expect("the device works");
    const RULE: SamplingRule = SamplingRule {
        temperature: 1.0,
        frequency_penalty: 0.9,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
    };
    fn request(history: &[u32], uniform: f64) -> SampleRequest<'_> {
        SampleRequest { rule: RULE, history, prompt_len: 1, uniform, logprob: true, top: 0 }
    }
    let uniform = |row: usize| (row as f64 + 0.5) / ROWS as f64;
    let source = |row: usize| (row * 91 + 17) % ROWS;
    for before in [SamplingRule { temperature: 0.0, ..RULE }, RULE] {
        let mut sampler = DeviceSampler::new(device, ROWS, vocab).expect("small");
        let first: Vec<_> =
            (0..ROWS).map(|row| SampleRequest { rule: before, ..request(&[], uniform(row)) }).collect();
        let unknown: Vec<_> = (0..ROWS).map(|row| [4, 8, 8, FED + source(row) as u32]).collect();
        let second: Vec<_> = (0..ROWS).map(|row| request(&unknown[row], uniform(row))).collect();
        sampler.begin(device, &buffer, &first).expect("the device works");
        // A graph of the second step ends with the greedy choice, whoever wants it.
        sampler.queue_greedy(device, &buffer, ROWS, true).expect("the device works");
        sampler.begin(device, &buffer, &second).expect("the device works");
        let chosen = sampler.collect(device).expect("the device works");
        let found = sampler.collect(device).expect("the device works");
        let known: Vec<_> = (0..ROWS).map(|row| [4, 8, 8, chosen[source(row)].choice.token]).collect();
        let third: Vec<_> = (0..ROWS).map(|row| request(&known[row], uniform(row))).collect();
        assert_eq!(found, sampler.sample(device, &buffer, &third).expect("the device works"));
        let without: Vec<_> = (0..ROWS).map(|row| request(&known[row][..3], uniform(row))).collect();
        let without = sampler.sample(device, &buffer, &without).expect("the device works");
        assert!(found != without, "the last token of the history counts for nothing");
        let far = [FED + ROWS as u32];
        assert!(sampler.sample(device, &buffer, &[request(&far, 0.5)]).is_err(), "a row that there is not");
        let plain = SampleRequest { rule: SamplingRule::default(), ..request(&[], 0.5) };
        sampler.sample(device, &buffer, &[plain]).expect("the device works");
        assert!(
            sampler.sample(device, &buffer, &[request(&[FED], 0.5)]).is_err(),
            "no token was kept of a batch without penalties"
        );
    }
}

/// Chi-square of seeded draws against the reference, and the degrees of freedom. Nothing impossible is drawn.
fn chi_square(
    sample: SampleRows<'_>,
    logits: &[f32],
    rule: SamplingRule,
    history: &[u32],
    rng: &mut StdRng,
) -> (f64, usize) {
    let draws = draws() / ROWS * ROWS;
    let expected = reference::distribution(logits, &rule, history, 3);
    let mut counts = vec![0usize; logits.len()];
    for _ in 0..draws / ROWS {
        let rows: Vec<Row<'_>> =
            (0..ROWS).map(|_| Row { rule, history, prompt_len: 3, uniform: rng.random::<f64>() }).collect();
        for choice in sample(logits, &rows) {
            counts[choice.token as usize] += 1;
        }
    }
    let mut sum = 0.0;
    for (token, (&count, p)) in counts.iter().zip(&expected).enumerate() {
        assert!(count == 0 || *p > 0.0, "token {token} has probability zero and was drawn {count} times");
        if *p > 0.0 {
            sum += (count as f64 - p * draws as f64).powi(2) / (p * draws as f64);
        }
    }
    (sum, expected.iter().filter(|p| **p > 0.0).count() - 1)
}

/// Tokens so far of the rows that are drawn.
const HISTORY: [u32; 7] = [1, 5, 5, 9, 22, 5, 9];

/// Logits of a small vocabulary, and rules of every kind.
fn logits_and_rules() -> (Vec<f32>, [SamplingRule; 9]) {
    let random = SamplingRule { temperature: 1.0, ..SamplingRule::default() };
    let rules = [
        random,
        SamplingRule { temperature: 0.6, ..random },
        SamplingRule { top_k: 5, ..random },
        SamplingRule { top_p: 0.7, ..random },
        SamplingRule { min_p: 0.2, ..random },
        SamplingRule { temperature: 1.7, top_k: 12, top_p: 0.8, min_p: 0.1, ..random },
        SamplingRule { repetition_penalty: 1.5, ..random },
        SamplingRule { presence_penalty: 0.8, frequency_penalty: 0.4, ..random },
        SamplingRule { repetition_penalty: 0.7, frequency_penalty: -0.5, top_k: 9, ..random },
    ];
    ((0..23).map(|i| ((i * 7) % 23) as f32 * 0.15 - 1.0).collect(), rules)
}

#[test]
fn draws_follow_the_distribution() {
    let (logits, rules) = logits_and_rules();
    for mut rng in seeds(&[22]) {
        // One seed in some hundreds is beyond a limit by chance, and the usual one is not: all devices have its draws.
        let seed = rng.random();
        on_every_device(|name, sample| {
            let mut rng = StdRng::seed_from_u64(seed);
            for rule in rules {
                let (chi, freedom) = chi_square(sample, &logits, rule, &HISTORY, &mut rng);
                // Five standard deviations above the mean. Of few draws, rare tokens make any sum.
                let limit = freedom as f64 + 5.0 * (2.0 * freedom as f64).sqrt();
                assert!(
                    draws() < DRAWS || chi < limit,
                    "{name} {rule:?}: {chi:.1} with {freedom} degrees of freedom"
                );
            }
        });
    }
}

/// Log-probabilities of these logits in float64. NaN counts as minus infinity.
fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let logits = logits.iter().map(|&x| if x.is_nan() { f64::NEG_INFINITY } else { f64::from(x) });
    let greatest = logits.clone().fold(f64::NEG_INFINITY, f64::max);
    if greatest == f64::NEG_INFINITY {
        return logits.collect();
    }
    let log_total = greatest + logits.clone().map(|x| (x - greatest).exp()).sum::<f64>().ln();
    logits.map(|x| x - log_total).collect()
}

/// A log-probability is of the logits as they are given, whatever the rule makes of them: of every kind of rule, of tokens
/// that are penalized and of others, in vocabularies of less than a chunk, of several, and of all blocks of a row.
#[test]
fn log_probabilities_of_draws_are_of_the_logits_before_the_rule() {
    let (small, rules) = logits_and_rules();
    let random = SamplingRule { temperature: 1.0, ..SamplingRule::default() };
    // Not drawn, but by the general kernel; and all of a rule at once, which favours what was seen.
    let more = [
        SamplingRule { repetition_penalty: 1.5, ..SamplingRule::default() },
        SamplingRule { temperature: 40.0, top_p: 0.999, ..random },
        SamplingRule {
            temperature: 0.8,
            top_k: 50,
            top_p: 0.95,
            min_p: 0.01,
            repetition_penalty: 0.8,
            presence_penalty: -6.0,
            frequency_penalty: -0.5,
        },
    ];
    let rules: Vec<SamplingRule> = rules.into_iter().chain(more).collect();
    for mut rng in seeds(&[23]) {
        on_every_device(|name, sample| {
            log_probabilities_of_draws(&small, &rules, name, sample, &mut rng);
            let drawn: [_; 3] = std::array::from_fn(|_| rng.random_range(100..=50_000));
            for vocab in [1, 1000, 5000, 49_152, 128_256].into_iter().chain(drawn) {
                let mut logits: Vec<f32> = (0..vocab).map(|_| rng.random_range(0.0..12.0)).collect();
                if vocab > 1 {
                    // Far below and far above the others, and nothing.
                    (logits[3], logits[9], logits[10]) = (-90.0, 14.5, f32::NAN);
                    (logits[vocab - 2], logits[vocab - 1]) = (f32::NEG_INFINITY, 13.0);
                }
                log_probabilities_of_draws(&logits, &rules, name, sample, &mut rng);
            }
        });
    }
}

fn log_probabilities_of_draws(
    logits: &[f32],
    rules: &[SamplingRule],
    name: &str,
    sample: SampleRows<'_>,
    rng: &mut StdRng,
) {
    let vocab = logits.len();
    let history: Vec<u32> = HISTORY.into_iter().chain([vocab as u32 - 1, 40, vocab as u32 / 2]).collect();
    let rows: Vec<Row<'_>> = rules
        .iter()
        .flat_map(|&rule| {
            [0.0, 0.04, 0.27, rng.random(), 0.73, 0.96, 0.999_999].map(|uniform| (rule, uniform))
        })
        .map(|(rule, uniform)| Row { rule, history: &history, prompt_len: 3, uniform })
        .collect();
    let expected = log_probabilities(logits);
    let choices = sample(logits, &rows);
    for (row, choice) in rows.iter().zip(&choices) {
        let expected = expected[choice.token as usize];
        let error = (f64::from(choice.logprob) - expected).abs();
        let what = format!("{name}: {vocab} tokens, {row:?}: {choice:?}, expected {expected}");
        assert!(error < 1e-5 * expected.abs().max(1.0), "{what}");
    }
    let seen = choices.iter().filter(|choice| history.contains(&choice.token)).count();
    assert!(vocab == 1 || (seen > 0 && seen < rows.len()), "{name}, {vocab} tokens: {seen} drawn were seen");
}

#[test]
fn rows_of_a_batch_are_drawn_as_if_alone() {
    let (small, rules) = logits_and_rules();
    for mut rng in seeds(&[24]) {
        on_every_device(|name, sample| {
            let vocab = rng.random_range(24..=9000);
            let drawn: Vec<f32> = (0..vocab).map(|_| rng.random_range(-6.0..6.0)).collect();
            for logits in [&small, &drawn] {
                let rows: Vec<Row<'_>> = rules
                    .iter()
                    .flat_map(|&rule| [0.03, rng.random(), 0.97].map(|uniform| (rule, uniform)))
                    .map(|(rule, uniform)| Row { rule, history: &HISTORY, prompt_len: 3, uniform })
                    .collect();
                let together = sample(logits, &rows);
                for (row, choice) in rows.iter().zip(together) {
                    let alone = &sample(logits, &[*row])[0];
                    let what = format!("{name}, {} tokens: {row:?}", logits.len());
                    assert_eq!((choice.token, choice.logprob), (alone.token, alone.logprob), "{what}");
                }
            }
        });
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_the_greatest() {
    for mut rng in seeds(&[25]) {
        on_every_device(|name, sample| {
            let greedy = Row { rule: SamplingRule::default(), history: &[], prompt_len: 0, uniform: 0.99 };
            for zeros in [[-0.0, 0.0], [0.0, -0.0]] {
                assert_eq!(sample(&zeros, &[greedy])[0].token, 0, "{name}: zeros are equal");
            }
            let drawn: [_; 3] = std::array::from_fn(|_| rng.random_range(10..=200_000));
            for vocab in [1, 37, 5000, 49_152, 128_256].into_iter().chain(drawn) {
                let mut logits: Vec<f32> = (0..vocab).map(|_| rng.random_range(-4.0..2.0)).collect();
                let first = rng.random_range(vocab / 4..=vocab / 3);
                let greatest = [first, rng.random_range(first..vocab), vocab - 1];
                greatest.iter().for_each(|&at| logits[at] = 2.5);
                if vocab > 1000 {
                    logits[7] = f32::NAN;
                    logits[8] = f32::NEG_INFINITY;
                }
                let log_total = logits.iter().filter(|x| x.is_finite()).map(|&x| f64::from(x - 2.5).exp());
                let expected = -log_total.sum::<f64>().ln();
                for choice in sample(&logits, &[greedy; 3]) {
                    assert_eq!(choice.token as usize, first, "{name}: {vocab} tokens");
                    let error = (f64::from(choice.logprob) - expected).abs();
                    assert!(
                        error < 1e-5 * expected.abs().max(1.0),
                        "{name}: {choice:?}, expected {expected}"
                    );
                }
            }
        });
    }
}

#[test]
fn a_draw_of_a_large_vocabulary_keeps_to_what_the_rule_leaves() {
    let vocab = 49_152;
    let logits: Vec<f32> = (0..vocab).map(|i| ((i * 7919) % vocab) as f32 * 2e-4).collect();
    let rule = SamplingRule { temperature: 0.8, top_k: 40, top_p: 0.9, ..SamplingRule::default() };
    let allowed = reference::distribution(&logits, &rule, &[], 0);
    on_every_device(|name, sample| {
        let rows: Vec<Row<'_>> = (0..ROWS)
            .map(|i| Row { rule, history: &[], prompt_len: 0, uniform: (i as f64 + 0.5) / ROWS as f64 })
            .collect();
        let choices = sample(&logits, &rows);
        for choice in &choices {
            assert!(allowed[choice.token as usize] > 0.0, "{name}: {choice:?}");
        }
        let mut tokens: Vec<u32> = choices.iter().map(|choice| choice.token).collect();
        tokens.sort_unstable();
        tokens.dedup();
        // Evenly spaced draws meet every token that is likelier than their distance.
        let likely = allowed.iter().filter(|&&p| p > 1.0 / ROWS as f64).count();
        assert!(tokens.len() >= likely, "{name}: {} of {likely} tokens", tokens.len());
    });
}
