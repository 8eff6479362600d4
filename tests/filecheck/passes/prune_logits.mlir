// RUN: furiosa-llm opt %s --passes prune-logits --split-input-file | filecheck %s
// RUN: furiosa-llm opt %s --passes "prune-logits{rows=0}" --split-input-file | filecheck %s --check-prefix NONE
// RUN: furiosa-llm opt %s --passes "prune-logits{rows=all}" --split-input-file | filecheck %s --check-prefix ALL

// The norm works row by row, so the row is cut before it. Without logits, the epilogue goes and
// the parameters that only it needs; the cache stays.
nn.parameter @norm : tensor<4xf32>
nn.parameter @head : tensor<9x4xf32>
func.func @forward(%input_ids: tensor<2x3xi32>, %position_ids: tensor<2x3xi32>, %slots: tensor<2x3xi32>, %table: tensor<2x8xi32>, %lengths: tensor<2xi32>, %cache: tensor<5x1x2x4xf32>) -> (tensor<2x3x9xf32>, tensor<5x1x2x4xf32>) {
  %norm = nn.get_parameter @norm : tensor<4xf32>
  %head = nn.get_parameter @head : tensor<9x4xf32>
  %x, %c = "test.op"(%cache) : (tensor<5x1x2x4xf32>) -> (tensor<2x3x4xf32>, tensor<5x1x2x4xf32>)
  %y = func.call @epilogue(%x, %norm, %head) : (tensor<2x3x4xf32>, tensor<4xf32>, tensor<9x4xf32>) -> tensor<2x3x9xf32> loc("")
  func.return %y, %c : tensor<2x3x9xf32>, tensor<5x1x2x4xf32>
}
func.func private @epilogue(%x: tensor<2x3x4xf32>, %norm: tensor<4xf32>, %head: tensor<9x4xf32>) -> tensor<2x3x9xf32> {
  %0 = nn.rms_norm %x, %norm eps 1.0e-05 : tensor<2x3x4xf32>, tensor<4xf32> -> tensor<2x3x4xf32> loc("norm"("a"))
  %1 = nn.linear %0, %head : tensor<2x3x4xf32>, tensor<9x4xf32> -> tensor<2x3x9xf32> loc("head"("b"))
  func.return %1 : tensor<2x3x9xf32>
}
// CHECK:      func.func @forward({{.*}}) -> (tensor<2x1x9xf32>, tensor<5x1x2x4xf32>)
// CHECK:        %y = func.call @epilogue(%x, %norm, %head, %lengths) : {{.*}} -> tensor<2x1x9xf32> loc("")
// CHECK-NEXT:   func.return %y, %c
// CHECK:      func.func private @epilogue({{.*}}, %lengths: tensor<2xi32> {{.*}}) -> tensor<2x1x9xf32>
// CHECK-NEXT:   [[ROW:%.*]] = paged.last_token %x, %lengths : {{.*}} -> tensor<2x1x4xf32> loc("norm"("a"))
// CHECK-NEXT:   [[NORM:%.*]] = nn.rms_norm [[ROW]], %norm eps 1.0e-05 : {{.*}} loc("norm"("a"))
// CHECK-NEXT:   [[Y:%.*]] = nn.linear [[NORM]], %head : {{.*}} loc("head"("b"))
// CHECK-NEXT:   func.return [[Y]]

// NONE:       builtin.module {
// NONE-NEXT:    func.func @forward({{.*}}) -> tensor<5x1x2x4xf32> {
// NONE-NEXT:      %x, %c = "test.op"(%cache)
// NONE-NEXT:      func.return %c
// NONE-NEXT:    }
// NONE-NEXT:  }

// ALL:        func.func @forward({{.*}}) -> (tensor<2x3x9xf32>, tensor<5x1x2x4xf32>)
// ALL:          func.call @epilogue(%x, %norm, %head) :
// ALL-NOT:    last_token

// -----

// Before the first op that mixes rows; both sides of a sum are cut, and what is the same for all
// rows is not. An op whose whole result is needed elsewhere is not done again for one row.
func.func @forward(%input_ids: tensor<2x3xi32>, %position_ids: tensor<2x3xi32>, %slots: tensor<2x3xi32>, %table: tensor<2x8xi32>, %lengths: tensor<2xi32>) -> tensor<2x3x4xf32> {
  %x, %w, %row = "test.op"() : () -> (tensor<2x3x4xf32>, tensor<4xf32>, tensor<1x4xf32>)
  %0 = nn.mean %x dims [1] keepdim : tensor<2x3x4xf32> -> tensor<2x1x4xf32>
  %1 = nn.sub %x, %0 : tensor<2x3x4xf32>, tensor<2x1x4xf32> -> tensor<2x3x4xf32>
  %2 = nn.tanh %1 : tensor<2x3x4xf32>
  "test.op"(%2) : (tensor<2x3x4xf32>) -> ()
  %3 = nn.mul %row, %2 : tensor<1x4xf32>, tensor<2x3x4xf32> -> tensor<2x3x4xf32>
  %4 = nn.add %1, %3 : tensor<2x3x4xf32>, tensor<2x3x4xf32> -> tensor<2x3x4xf32>
  func.return %4 : tensor<2x3x4xf32>
}
// CHECK:      func.func @forward
// CHECK:        [[FULL:%.*]] = nn.sub %x
// CHECK-NEXT:   [[SUM_ROW:%.*]] = paged.last_token [[FULL]], %lengths
// CHECK-NEXT:   [[TANH:%.*]] = nn.tanh [[FULL]]
// CHECK-NEXT:   [[TANH_ROW:%.*]] = paged.last_token [[TANH]], %lengths
// CHECK-NEXT:   "test.op"([[TANH]])
// CHECK-NEXT:   [[MUL:%.*]] = nn.mul %row, [[TANH_ROW]] : {{.*}} -> tensor<2x1x4xf32>
// CHECK-NEXT:   [[Y:%.*]] = nn.add [[SUM_ROW]], [[MUL]] : {{.*}} -> tensor<2x1x4xf32>
// CHECK-NEXT:   func.return [[Y]]
