//! One rank: what it is loaded as, and the thread that does what it is told.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use quire_kernels::Group;
use quire_kernels::cpu::CpuGroup;

use crate::model::Shard;
use crate::{EngineError, KvCopy, KvLayout, ModelExecutor, ModelInfo, SampleRow, ScheduledBatch};

/// A rank that is being loaded.
pub(crate) struct Rank<G> {
    /// The ranks that it is one of.
    pub(crate) group: Arc<G>,
    /// Which part of the model it has.
    pub(crate) shard: Shard,
}

/// Ranks that can be told that one has failed, on the host and on the devices.
pub(crate) trait RankGroup: Send + Sync + 'static {
    /// Where they meet on the host.
    fn group(&self) -> &Group;
    /// Ends the wait of all others, for this reason.
    fn fail(&self, why: &str);
}

impl RankGroup for CpuGroup {
    fn group(&self) -> &Group {
        CpuGroup::group(self)
    }
    fn fail(&self, why: &str) {
        CpuGroup::group(self).fail(why);
    }
}

#[cfg(feature = "cuda")]
impl RankGroup for quire_kernels::cuda::NcclGroup {
    fn group(&self) -> &Group {
        quire_kernels::cuda::NcclGroup::group(self)
    }
    fn fail(&self, why: &str) {
        quire_kernels::cuda::NcclGroup::fail(self, why);
    }
}

/// What every rank is to do.
#[derive(Clone)]
pub(super) enum Command {
    Prepare(KvLayout),
    ReserveHost(u64),
    CopyKv(Arc<[KvCopy]>),
    /// The first so many layers, or all.
    Forward(Arc<ScheduledBatch>, Option<usize>),
    Sample(Arc<[SampleRow]>),
    Collect,
}

impl Command {
    fn run(self, executor: &mut dyn ModelExecutor) -> Result<(), EngineError> {
        match self {
            Self::Prepare(layout) => executor.prepare(layout, &mut |_, _| {}),
            Self::ReserveHost(bytes) => executor.reserve_host(bytes).map(drop),
            Self::CopyKv(copies) => executor.copy_kv(&copies),
            Self::Forward(batch, None) => executor.forward(&batch),
            Self::Forward(batch, Some(layers)) => executor.forward_layers(&batch, layers),
            Self::Sample(rows) => executor.sample(&rows),
            Self::Collect => executor.collect().map(drop),
        }
    }
}

/// A rank on a thread of its own.
pub(super) struct Worker {
    /// None when it is to end.
    commands: Option<Sender<Command>>,
    done: Receiver<Result<(), EngineError>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread of a rank, which sends what it has loaded to `loaded`.
    pub(super) fn start<G: RankGroup>(
        rank: Rank<G>,
        load: Arc<Load<G>>,
        loaded: Sender<Result<ModelInfo, EngineError>>,
    ) -> std::io::Result<Self> {
        let (commands, received) = channel();
        let (finished, done) = channel();
        let thread = std::thread::Builder::new()
            .name(format!("quire-rank-{}", rank.shard.rank))
            .spawn(move || serve(&rank, &*load, loaded, &received, &finished))?;
        Ok(Self { commands: Some(commands), done, thread: Some(thread) })
    }

    /// Tells it what to do, to which it answers once.
    pub(super) fn send(&self, command: Command) {
        // Where the thread has ended, waiting for its answer says so.
        let _ = self.commands.as_ref().map(|commands| commands.send(command));
    }

    /// Waits for its oldest answer.
    pub(super) fn wait(&self) -> Result<(), EngineError> {
        self.done.recv().unwrap_or_else(|_| Err(EngineError::Config("a rank's thread has ended".into())))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Loads a rank's part; the other argument hears the layers loaded and their number.
pub(super) type Load<G> = dyn Fn(&Rank<G>, &mut dyn FnMut(usize, usize)) -> Result<Box<dyn ModelExecutor>, EngineError>
    + Send
    + Sync;

/// A rank's thread: loads its part, and does what it is told.
fn serve<G: RankGroup>(
    rank: &Rank<G>,
    load: &Load<G>,
    loaded: Sender<Result<ModelInfo, EngineError>>,
    commands: &Receiver<Command>,
    finished: &Sender<Result<(), EngineError>>,
) {
    let _guard = PanicGuard(&*rank.group);
    let executor = load(rank, &mut |_, _| {}).inspect_err(|e| rank.group.fail(&e.to_string()));
    let mut executor = match executor {
        Ok(executor) => executor,
        Err(error) => {
            let _ = loaded.send(Err(error));
            return;
        }
    };
    if loaded.send(Ok(executor.info().clone())).is_err() {
        return;
    }
    // Whoever reads what was loaded waits until nobody can send more.
    drop(loaded);
    for command in commands {
        let outcome = command.run(&mut *executor).inspect_err(|e| fail_for(e, &*rank.group));
        if finished.send(outcome).is_err() {
            return;
        }
    }
}

/// Ends the group for an error in which the ranks may differ. What a call asks for in vain is refused by all of them, before
/// any waits for another: they can go on.
pub(super) fn fail_for(error: &EngineError, group: &dyn RankGroup) {
    if let EngineError::Kernel(error) = error {
        group.fail(&error.to_string());
    }
}

/// Ends the group where its rank's thread panics: the others would wait for ever.
pub(super) struct PanicGuard<'a>(pub(super) &'a dyn RankGroup);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail("a rank's thread panicked");
        }
    }
}
