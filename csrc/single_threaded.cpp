// libstdc++ counts references without atomics while glibc, from 2.32 on, says that there is one thread. Here that
// is never so, with torch's threads, and without glibc's word the library loads with older ones too
// (manylinux_2_27).
extern "C" {
[[gnu::visibility("hidden")]] char __libc_single_threaded = 0;
}
