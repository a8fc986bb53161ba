// Records the activities of a GPU through CUPTI, and the operator that launched each of them.
// CUPTI records the whole process, so every framework is covered. A callback at each launch reads
// the operator from the stack. For a kernel in a CUDA graph, it is the launch during capture.
// libcupti is loaded at run time.
//
// Every function returns 0, or -1 with the reason in tb_gpu_last_error().

#include <cupti.h>
#include <dlfcn.h>
#include <execinfo.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

std::string last_error;

struct Api {
  decltype(&cuptiActivityRegisterCallbacks) register_callbacks = nullptr;
  decltype(&cuptiActivityEnable) enable = nullptr;
  decltype(&cuptiActivityDisable) disable = nullptr;
  decltype(&cuptiActivityFlushAll) flush = nullptr;
  decltype(&cuptiActivityGetNextRecord) next_record = nullptr;
  decltype(&cuptiSubscribe) subscribe = nullptr;
  decltype(&cuptiEnableDomain) enable_domain = nullptr;
  decltype(&cuptiUnsubscribe) unsubscribe = nullptr;
  decltype(&cuptiGetGraphNodeId) graph_node_id = nullptr;
  decltype(&cuptiGetResultString) result_string = nullptr;
};
Api api;

struct Record {
  std::string name;
  uint64_t start, end, node;
  uint32_t stream, correlation;
};

std::mutex guard;
std::vector<Record> records;
// "phase;operator" of each launch, by correlation id and by graph node.
std::unordered_map<uint32_t, std::string> launch_operators;
std::unordered_map<uint64_t, std::string> node_operators;
CUpti_SubscriberHandle subscriber = nullptr;

bool load() {
  if (api.enable) return true;
  void* library = nullptr;
  for (const char* name : {"libcupti.so.13", "libcupti.so.12", "libcupti.so"}) {
    if ((library = dlopen(name, RTLD_NOW))) break;
  }
  if (!library) {
    last_error = "libcupti was not found: run ./scripts/setup on this machine";
    return false;
  }
  bool all = true;
  auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    all = all && function;
  };
  find(api.register_callbacks, "cuptiActivityRegisterCallbacks");
  find(api.disable, "cuptiActivityDisable");
  find(api.flush, "cuptiActivityFlushAll");
  find(api.next_record, "cuptiActivityGetNextRecord");
  find(api.subscribe, "cuptiSubscribe");
  find(api.enable_domain, "cuptiEnableDomain");
  find(api.unsubscribe, "cuptiUnsubscribe");
  find(api.graph_node_id, "cuptiGetGraphNodeId");
  find(api.result_string, "cuptiGetResultString");
  find(api.enable, "cuptiActivityEnable");
  if (!all) {
    last_error = "this libcupti lacks required functions";
    api.enable = nullptr;
  }
  return all;
}

bool check(CUptiResult result, const char* what) {
  if (result == CUPTI_SUCCESS) return true;
  const char* text = nullptr;
  api.result_string(result, &text);
  last_error = std::string(what) + ": " + (text ? text : "CUPTI reported no reason");
  if (result == CUPTI_ERROR_INSUFFICIENT_PRIVILEGES) {
    last_error += "; only root may profile on this machine (NVreg_RestrictProfilingToAdminUsers)";
  }
  return false;
}

void CUPTIAPI provide_buffer(uint8_t** buffer, size_t* size, size_t* most) {
  *size = 4 << 20;
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *size));
  *most = 0;
}

void CUPTIAPI read_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  std::lock_guard lock(guard);
  CUpti_Activity* record = nullptr;
  while (valid > 0 && api.next_record(buffer, valid, &record) == CUPTI_SUCCESS) {
    switch (record->kind) {
      case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL:
      case CUPTI_ACTIVITY_KIND_KERNEL: {
        auto* k = reinterpret_cast<CUpti_ActivityKernel9*>(record);
        records.push_back({k->name ? k->name : "?", k->start, k->end, k->graphNodeId, k->streamId, k->correlationId});
        break;
      }
      case CUPTI_ACTIVITY_KIND_MEMCPY: {
        auto* m = reinterpret_cast<CUpti_ActivityMemcpy5*>(record);
        records.push_back({"[memory copy]", m->start, m->end, m->graphNodeId, m->streamId, m->correlationId});
        break;
      }
      case CUPTI_ACTIVITY_KIND_MEMSET: {
        auto* m = reinterpret_cast<CUpti_ActivityMemset4*>(record);
        records.push_back({"[memory set]", m->start, m->end, m->graphNodeId, m->streamId, m->correlationId});
        break;
      }
      default:
        break;
    }
  }
  std::free(buffer);
}

// Returns the identifier after a mangled prefix: `add` for `_ZN2at4_ops3add4call` and `_ZN2at4_ops`.
std::string identifier(const char* symbol, const char* prefix) {
  const size_t length = std::strlen(prefix);
  if (std::strncmp(symbol, prefix, length) != 0) return {};
  char* end = nullptr;
  const unsigned long size = std::strtoul(symbol + length, &end, 10);
  return size && size <= std::strlen(end) ? std::string(end, size) : std::string();
}

// Returns "phase;operator" of the calling stack, with the innermost operator.
std::string calling_operator() {
  static std::unordered_map<void*, std::string> symbols;
  void* frames[96];
  const int count = backtrace(frames, 96);
  std::string name;
  const char* phase = "forward";
  for (int i = 2; i < count; ++i) {
    auto [entry, fresh] = symbols.try_emplace(frames[i]);
    if (fresh) {
      Dl_info info;
      if (dladdr(frames[i], &info) && info.dli_sname) entry->second = info.dli_sname;
    }
    const char* symbol = entry->second.c_str();
    if (name.empty()) {
      if (auto op = identifier(symbol, "_ZN2at4_ops"); !op.empty()) name = "aten::" + op;
      if (auto op = identifier(symbol, "_ZN3mlx4core"); !op.empty() && std::strstr(symbol, "8eval_gpu")) {
        name = "mlx::" + op;
      }
    }
    if (std::strncmp(symbol, "_ZN5torch8autograd6Engine", 25) == 0) phase = "backward";
  }
  if (name.find("adam") != std::string::npos) phase = "optimizer";
  // MLX evaluates one graph with all phases, so its phase is unknown.
  if (name.rfind("mlx::", 0) == 0) return "step;" + name;
  return std::string(phase) + ";" + (name.empty() ? "other" : name);
}

bool is_launch(const char* function) {
  for (const char* start : {"cudaLaunch", "cudaMemcpy", "cudaMemset", "cuLaunch", "cuMemcpy", "cuMemset"}) {
    if (std::strncmp(function, start, std::strlen(start)) == 0) return true;
  }
  return false;
}

void CUPTIAPI on_callback(void*, CUpti_CallbackDomain domain, CUpti_CallbackId id, const void* data) {
  if (domain == CUPTI_CB_DOMAIN_RESOURCE) {
    if (id != CUPTI_CBID_RESOURCE_GRAPHNODE_CREATED && id != CUPTI_CBID_RESOURCE_GRAPHNODE_CLONED) return;
    auto* graph = static_cast<CUpti_GraphData*>(static_cast<const CUpti_ResourceData*>(data)->resourceDescriptor);
    uint64_t node = 0, original = 0;
    if (api.graph_node_id(graph->node, &node) != CUPTI_SUCCESS) return;
    std::lock_guard lock(guard);
    if (id == CUPTI_CBID_RESOURCE_GRAPHNODE_CREATED) {
      node_operators[node] = calling_operator();
    } else if (api.graph_node_id(graph->originalNode, &original) == CUPTI_SUCCESS) {
      node_operators[node] = node_operators[original];
    }
    return;
  }
  auto* call = static_cast<const CUpti_CallbackData*>(data);
  if (call->callbackSite != CUPTI_API_ENTER || !is_launch(call->functionName)) return;
  std::lock_guard lock(guard);
  auto [entry, fresh] = launch_operators.try_emplace(call->correlationId);
  if (fresh) entry->second = calling_operator();
}

}  // namespace

extern "C" {

struct tb_activity {
  const char* name;
  // "phase;operator", or empty if the launch was not observed.
  const char* launched_by;
  uint64_t start, end;
  uint32_t stream;
};

const char* tb_gpu_last_error() { return last_error.c_str(); }

// Starts to attribute launches to operators. CUDA graphs must be captured after this call.
int tb_gpu_start_attribution() {
  if (!load()) return -1;
  if (subscriber) return 0;
  // The first call loads libgcc, which must not happen in a callback.
  void* frame[1];
  backtrace(frame, 1);
  bool ok = check(api.subscribe(&subscriber, on_callback, nullptr), "attributing launches");
  for (auto domain : {CUPTI_CB_DOMAIN_RUNTIME_API, CUPTI_CB_DOMAIN_DRIVER_API, CUPTI_CB_DOMAIN_RESOURCE}) {
    ok = ok && check(api.enable_domain(1, subscriber, domain), "attributing launches");
  }
  return ok ? 0 : -1;
}

int tb_gpu_stop_attribution() {
  if (!subscriber) return 0;
  auto ended = subscriber;
  subscriber = nullptr;
  return check(api.unsubscribe(ended), "ending the attribution of launches") ? 0 : -1;
}

int tb_gpu_begin() {
  if (!load()) return -1;
  bool ok = check(api.register_callbacks(provide_buffer, read_buffer), "recording activities");
  for (auto kind : {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET}) {
    ok = ok && check(api.enable(kind), "recording activities");
  }
  std::lock_guard lock(guard);
  records.clear();
  return ok ? 0 : -1;
}

// Ends the recording and passes every activity to `take`.
int tb_gpu_end(void (*take)(void*, const tb_activity*), void* to) {
  bool ok = check(api.flush(1), "reading activities");
  for (auto kind : {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET}) {
    api.disable(kind);
  }
  std::lock_guard lock(guard);
  for (const auto& record : records) {
    const char* launcher = "";
    if (auto node = node_operators.find(record.node); record.node && node != node_operators.end()) {
      launcher = node->second.c_str();
    } else if (auto call = launch_operators.find(record.correlation); call != launch_operators.end()) {
      launcher = call->second.c_str();
    }
    const tb_activity activity{record.name.c_str(), launcher, record.start, record.end, record.stream};
    take(to, &activity);
  }
  records.clear();
  launch_operators.clear();
  return ok ? 0 : -1;
}

}  // extern "C"
