// How warps of a block that do different work, copy or compute, wait for each other: by barriers in shared memory
// (mbarrier, from sm_90 on), each named by its address, and by numbered ones (bar).
//
// The phases of one in shared memory have parity 0, 1, 0 and so on. One is complete when as many have arrived as
// barrier_init said and all expected bytes have been copied.
#pragma once
#include "common.cuh"

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and makes the phase wait for so many bytes more.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Whether the phase of this parity is complete.
__device__ __forceinline__ bool barrier_test(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}
// The same, but the thread may be suspended for a while first, until it is.
__device__ __forceinline__ bool barrier_try(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}
// Until the phase of this parity is complete; what its arrivals made visible is seen then. Of a new barrier, the phase
// of parity 1 counts as complete.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
#if defined(BOUNDED_WAITS)  // development: a mistake gives wrong results, and does not hang the card
    // No trap: with one in both branches of attention_prefill_hopper.cuh, ptxas no longer sees that they have registers
    // of their own.
    for (u32 tries = 0; tries < 1 << 15 && !barrier_try(barrier, parity); ++tries) {
    }
#else
    while (!barrier_try(barrier, parity)) {
    }
#endif
}
// The same for what the other block of the cluster sent.
__device__ __forceinline__ void barrier_wait_cluster(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n\t.reg .pred done;\n\t"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n\t"
            "selp.u32 %0, 1, 0, done;\n\t}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (done == 0);
}

// Orders ordinary reads and writes of shared memory with those of the asynchronous units (bulk copies, matrix
// instructions): of this thread before it, and of others that a barrier put before it, with what comes after.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers by number among COUNT threads; whoever arrives does not wait.
template <u32 COUNT>
__device__ __forceinline__ void threads_sync(u32 number) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(COUNT) : "memory");
}
template <u32 COUNT>
__device__ __forceinline__ void threads_arrive(u32 number) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(COUNT) : "memory");
}
