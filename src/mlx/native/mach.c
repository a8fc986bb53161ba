// mlx-rs seeds its default random key from this Mach call. The value is only a
// seed (the suite sets its own), so any monotonic clock serves off Apple.
#include <stdint.h>
#include <time.h>

uint64_t mach_approximate_time(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
